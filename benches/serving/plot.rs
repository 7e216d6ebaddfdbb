//! A chart of the processor time of a hit by size and server, on a logarithmic scale.

use std::fmt::Write;

use crate::cells::Results;
use crate::hit;
use crate::servers::{AFTERIMAGE, AGAINST, CACHED, NAIVE, NGINX, VARNISH};

/// Servers and their colours, from Okabe and Ito's palette for colour-blind readers.
const SERVERS: [(&str, &str); 6] = [
    (AFTERIMAGE, "#0072b2"),
    (AGAINST, "#56b4e9"),
    (NGINX, "#009e73"),
    (VARNISH, "#e69f00"),
    (CACHED, "#cc79a7"),
    (NAIVE, "#999999"),
];

/// A group of bars, its load and its size.
const GROUPS: [(&str, &str, &str); 5] = [
    ("304", hit::REVALIDATION, "50 KB"),
    ("2 KB", hit::PLAIN, "2 KB"),
    ("50 KB", hit::PLAIN, "50 KB"),
    ("200 KB", hit::PLAIN, "200 KB"),
    ("1 MB", hit::PLAIN, "1 MB"),
];

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 500.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 985.0;
const TOP: f64 = 90.0;
const BOTTOM: f64 = 460.0;

/// Draws the chart as SVG; `None` without measured hits.
pub(crate) fn svg(results: &Results) -> Option<String> {
    let of = |(_, load, size): (&str, &str, &str), server: &str| {
        results.find(hit::SECTION, load, size, server)?.median("cpu_us").filter(|it| *it > 0.0)
    };
    let shown: Vec<(&str, &str)> = SERVERS
        .into_iter()
        .filter(|(server, _)| GROUPS.iter().any(|group| of(*group, server).is_some()))
        .collect();
    let all = || GROUPS.iter().flat_map(|group| shown.iter().filter_map(|it| of(*group, it.0)));
    let most = all().reduce(f64::max)?;
    let least = all().reduce(f64::min)?;
    let (floor, ceiling) = (10_f64.powf(least.log10().floor()), 10_f64.powf(most.log10().ceil()));
    let height =
        |value: f64| BOTTOM - (BOTTOM - TOP) * (value / floor).log10() / (ceiling / floor).log10();

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"30\" font-size=\"18\">Processor time of one request for an image in \
         memory</text>\n\
         <text x=\"{LEFT}\" y=\"50\" fill=\"#555\">µs in the server's processes, logarithmic; \
         HTTP/1.1, 16 connections; medians</text>\n"
    );
    let mut line = floor;
    while line <= ceiling * 1.001 {
        let y = height(line);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {y:.1}H{RIGHT}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{line:.0}</text>",
            LEFT - 8.0,
            y + 4.0
        );
        line *= 10.0;
    }

    let mut x = LEFT;
    for (server, colour) in &shown {
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"62\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"73\">{server}</text>",
            x + 17.0
        );
        x += 150.0;
    }

    let mut left = LEFT;
    let group_width = (RIGHT - LEFT) / 5.0;
    for group in GROUPS {
        let bars: Vec<(f64, &str)> = shown
            .iter()
            .filter_map(|(server, colour)| Some((of(group, server)?, *colour)))
            .collect();
        let wide = bars.iter().fold(0.0, |sum, _| sum + 1.0);
        let width = (group_width * 0.86 / f64::max(wide, 4.0)).min(38.0);
        let mut x = left + (group_width - width * wide) / 2.0;
        for (value, colour) in bars {
            let y = height(value);
            let digits = usize::from(value < 100.0);
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\" text-anchor=\"middle\">{value:.digits$}</text>",
                width - 2.0,
                BOTTOM - y,
                x + width / 2.0 - 1.0,
                y - 4.0
            );
            x += width;
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"15\">{}</text>",
            left + group_width / 2.0,
            BOTTOM + 26.0,
            group.0
        );
        left += group_width;
    }
    let _ = writeln!(svg, "<path d=\"M{LEFT} {BOTTOM}H{RIGHT}\" stroke=\"#222\"/>\n</svg>");
    Some(svg)
}
