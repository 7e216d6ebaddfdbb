//! The two formats in which metrics are exposed: `OpenMetrics` 1.0, and Prometheus' own text format.

use std::fmt::Write;

/// Formats of a page of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposition {
    /// `OpenMetrics` 1.0.
    OpenMetrics,
    /// The Prometheus text format 0.0.4, which every scraper reads.
    Text,
}

impl Exposition {
    /// Returns its media type.
    #[must_use]
    pub const fn media_type(self) -> &'static str {
        match self {
            Exposition::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Exposition::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Converts a page of `OpenMetrics` to the text format.
///
/// There a family of counters or infos has the name of its samples, an info is a gauge, and there are no units, no times of
/// creation, no exemplars and no end marker.
pub(crate) fn to_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let (mut help, mut created) = (None, String::new());
    for line in open_metrics.lines() {
        if let Some(family_and_help) = line.strip_prefix("# HELP ") {
            // The type, which comes next, tells the name.
            help = Some(family_and_help);
        } else if let Some(family_and_kind) = line.strip_prefix("# TYPE ") {
            let (family, kind) =
                family_and_kind.split_once(' ').unwrap_or((family_and_kind, "unknown"));
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                other => ("", other),
            };
            if let Some(help) = help.take().and_then(|it| it.strip_prefix(family)) {
                let _ = writeln!(text, "# HELP {family}{suffix}{help}");
            }
            let _ = writeln!(text, "# TYPE {family}{suffix} {kind}");
            created = format!("{family}_created");
        } else if !line.starts_with('#') && !is_sample_of(line, &created) {
            text.push_str(without_exemplar(line));
            text.push('\n');
        }
    }
    text
}

/// Returns whether a sample has a name.
fn is_sample_of(line: &str, name: &str) -> bool {
    line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']))
}

/// Returns a sample without its exemplar, which begins at a `#` outside of the labels' values.
fn without_exemplar(line: &str) -> &str {
    let (mut quoted, mut escaped) = (false, false);
    let end = line.bytes().position(|byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'#' if !quoted => return true,
            _ => {}
        }
        false
    });
    line[..end.unwrap_or(line.len())].trim_ascii_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_openmetrics_has_is_left_out_of_the_text_format() {
        let open_metrics = r#"# HELP build The program.
# TYPE build info
build_info{version="1 # \" # 2"} 1
# HELP requests Requests.
# TYPE requests counter
requests_total{path="/#"} 3 # {trace_id="a"} 1.0 1520879607.789
requests_created{path="/#"} 1520872607.123
# HELP duration_seconds Time.
# TYPE duration_seconds histogram
# UNIT duration_seconds seconds
duration_seconds_sum 0.5
duration_seconds_count 1
duration_seconds_bucket{le="+Inf"} 1 # {} 0.5
duration_seconds_created 1520872607.123
# TYPE created_images gauge
created_images 2
# TYPE other unknown
other 1
# EOF
"#;
        let expected = r#"# HELP build_info The program.
# TYPE build_info gauge
build_info{version="1 # \" # 2"} 1
# HELP requests_total Requests.
# TYPE requests_total counter
requests_total{path="/#"} 3
# HELP duration_seconds Time.
# TYPE duration_seconds histogram
duration_seconds_sum 0.5
duration_seconds_count 1
duration_seconds_bucket{le="+Inf"} 1
# TYPE created_images gauge
created_images 2
# TYPE other untyped
other 1
"#;
        assert_eq!(to_text(open_metrics), expected);
    }
}
