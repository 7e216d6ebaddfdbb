//! Targets for Afterimage and the measured figures. A missed target is shown, and is no failure.

use serde_json::{Value, json};

use crate::bench::Bench;
use crate::cells::{Results, Spread};
use crate::servers::{AFTERIMAGE, CACHED, FLOOR, NGINX, VARNISH};
use crate::{cold, hit, memory, open, table};

pub(crate) struct Target {
    what: String,
    /// Largest figure that meets the target.
    limit: f64,
    measured: Option<Spread>,
    /// Figure of a server that only reads and writes.
    floor: Option<Spread>,
    digits: usize,
}

impl Target {
    fn new(what: &str, limit: f64, measured: Option<Spread>) -> Target {
        Target { what: what.to_owned(), limit, measured, floor: None, digits: 2 }
    }

    fn floor(self, floor: Option<Spread>) -> Target {
        Target { floor, ..self }
    }

    fn digits(self, digits: usize) -> Target {
        Target { digits, ..self }
    }

    fn verdict(&self) -> &'static str {
        match self.measured {
            None => "not measured",
            Some(it) if it.median <= self.limit => "met",
            Some(_) => "missed",
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "what": self.what,
            "at_most": self.limit,
            "measured": self.measured.map(Spread::json),
            "floor": self.floor.map(Spread::json),
            "verdict": self.verdict(),
        })
    }
}

pub(crate) fn all(bench: &Bench, results: &Results) -> Vec<Target> {
    let over = |ours: &str, load: &str, size: &str, peer: &str| {
        let cell = |server| results.find(hit::SECTION, load, size, server);
        cell(ours)?.over("cpu_us", cell(peer)?, "cpu_us")
    };
    let processor = |what: &str, limit: f64, load: &str, size: &str, peer: &str| {
        Target::new(what, limit, over(AFTERIMAGE, load, size, peer))
            .floor(over(FLOOR, load, size, peer))
    };
    let mut targets = Vec::new();
    for (size, limit) in [("2 KB", 1.0), ("50 KB", 1.0), ("200 KB", 1.0), ("1 MB", 0.5)] {
        let what = format!("CPU of a hit of {size} ÷ nginx's");
        targets.push(processor(&what, limit, hit::PLAIN, size, NGINX));
    }
    for size in ["2 KB", "50 KB", "200 KB"] {
        let what = format!("CPU of a hit of {size} ÷ Varnish's");
        targets.push(processor(&what, 0.6, hit::PLAIN, size, VARNISH));
    }
    let images = memory::flood_size(bench);
    targets.extend([
        processor("CPU of a 304 ÷ nginx's", 1.0, hit::REVALIDATION, "50 KB", NGINX),
        processor(
            "CPU of a hit of 1 MB ÷ that of the cached Python, 1/28",
            1.0 / 28.0,
            hit::PLAIN,
            "1 MB",
            CACHED,
        )
        .digits(4),
        Target::new(
            "a cold 1 MB in the server ÷ (GET + MD5)",
            1.15,
            cold::overhead(results, "1 MB", false),
        ),
        Target::new(
            "a cold 1 MB at the client, less the same hot, ÷ (GET + MD5)",
            1.15,
            cold::overhead(results, "1 MB", true),
        ),
        Target::new(
            &format!("resident MB after {images} images of 1 MB: 50 MiB of cache + 40 MiB"),
            90.0 * 1.048_576,
            memory::after_flood(results),
        )
        .digits(1),
        Target::new(
            "CPU of a hit among 50,000 images ÷ among 50",
            1.1,
            memory::among_many(results, AFTERIMAGE),
        )
        .floor(memory::among_many(results, FLOOR)),
        Target::new(
            "resident MB with 10,000 idle connections",
            200.0,
            memory::with_connections(results),
        )
        .digits(1),
        Target::new(
            "p99 of an open loop, each at 80 % of its own capacity, ÷ nginx's",
            1.0,
            open::beside_nginx(results, true),
        ),
        Target::new(
            "p99 of an open loop, both at 80 % of the slower one's, ÷ nginx's",
            1.0,
            open::beside_nginx(results, false),
        ),
    ]);
    targets
}

pub(crate) fn print(targets: &[Target]) {
    println!("Targets and measured figures: medians of the rounds, and their range:");
    let rows = targets.iter().map(|target| {
        let number = |value: f64| format!("{value:.*}", target.digits);
        let (median, range) = target.measured.map_or_else(
            || ("–".to_owned(), "–".to_owned()),
            |it| (number(it.median), format!("{}–{}", number(it.low), number(it.high))),
        );
        vec![
            target.what.clone(),
            target.verdict().to_owned(),
            format!("≤ {}", number(target.limit)),
            median,
            range,
            target.floor.map_or_else(|| "–".to_owned(), |it| number(it.median)),
        ]
    });
    table::print(
        2,
        &["target", "verdict", "wanted", "measured", "between", "floor"],
        &rows.collect::<Vec<_>>(),
    );
}
