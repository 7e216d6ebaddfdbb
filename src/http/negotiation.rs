//! Parses the preferences of a client (RFC 9110 §12): lists with quality values.

use axum::http::header::{ACCEPT, ACCEPT_ENCODING};
use axum::http::{HeaderMap, HeaderName};

use crate::exposition::Exposition;
use crate::image::MediaType;
use crate::image::coding::AcceptedCodings;
use crate::image::variant::AcceptedTypes;

/// Parses `Accept-Encoding` (§12.5.3).
pub(crate) fn accepted_codings(headers: &HeaderMap) -> AcceptedCodings {
    if !headers.contains_key(ACCEPT_ENCODING) {
        return AcceptedCodings::UNSAID;
    }
    let (mut brotli, mut gzip, mut identity, mut rest) = (None, None, None, None);
    for (name, weight) in weighted(headers, &ACCEPT_ENCODING) {
        let slot = match name {
            _ if name.eq_ignore_ascii_case("br") => &mut brotli,
            _ if name.eq_ignore_ascii_case("gzip") || name.eq_ignore_ascii_case("x-gzip") => {
                &mut gzip
            }
            _ if name.eq_ignore_ascii_case("identity") => &mut identity,
            "*" => &mut rest,
            _ => continue,
        };
        *slot = Some(weight);
    }
    AcceptedCodings {
        brotli: brotli.or(rest).unwrap_or(0),
        gzip: gzip.or(rest).unwrap_or(0),
        // Acceptable unless it is refused, and less preferred than anything named.
        identity: identity.or(rest).unwrap_or(1),
    }
}

/// Parses the image types of `Accept` (§12.5.1). Malformed members are skipped, but for the `*` that Java sends for `*/*`.
pub(crate) fn accepted_types(headers: &HeaderMap, makes_avif: bool) -> AcceptedTypes {
    if !headers.contains_key(ACCEPT) {
        return AcceptedTypes { named: [None; MediaType::ALL.len()], rest: 1000, makes_avif };
    }
    let (mut named, mut images, mut all) = ([None; MediaType::ALL.len()], None, None);
    let mut by_alias = named;
    for (name, weight) in weighted(headers, &ACCEPT) {
        match MediaType::ALL.iter().position(|it| it.is_named(name)) {
            Some(index) if MediaType::ALL[index].as_str().eq_ignore_ascii_case(name) => {
                named[index] = Some(weight);
            }
            Some(index) => by_alias[index] = Some(weight),
            None if name.eq_ignore_ascii_case("image/*") => images = Some(weight),
            None if matches!(name, "*/*" | "*") => all = Some(weight),
            None => {}
        }
    }
    for (named, by_alias) in named.iter_mut().zip(by_alias) {
        *named = named.or(by_alias);
    }
    AcceptedTypes { named, rest: images.or(all).unwrap_or(0), makes_avif }
}

/// Parses the formats of metrics in `Accept`. `OpenMetrics` is for clients that name it, and prefer nothing else; anybody else gets the
/// text format, those who accept neither as well: every scraper reads it.
pub(crate) fn accepted_exposition(headers: &HeaderMap) -> Exposition {
    let mut open_metrics = AcceptedFormat {
        main: "application",
        sub: "openmetrics-text",
        version: "1.0.0",
        best: (0, 0),
    };
    let mut text = AcceptedFormat { main: "text", sub: "plain", version: "0.0.4", best: (0, 0) };
    for line in headers.get_all(ACCEPT).into_iter().filter_map(|line| line.to_str().ok()) {
        for range in line.split(',') {
            open_metrics.see(range);
            text.see(range);
        }
    }
    let (precision, weight) = open_metrics.best;
    if weight > text.best.1 || (weight > 0 && weight == text.best.1 && precision >= NAMED) {
        Exposition::OpenMetrics
    } else {
        Exposition::Text
    }
}

/// Precision of a media range that names the type.
const NAMED: u8 = 3;

/// A format of metrics, and the most precise media range that it is in (RFC 9110 §12.5.1).
struct AcceptedFormat {
    main: &'static str,
    sub: &'static str,
    version: &'static str,
    /// Precision and weight.
    best: (u8, u16),
}

impl AcceptedFormat {
    /// Takes a media range into account. Parameters other than the version (`charset`, `escaping`) are no difference here.
    fn see(&mut self, range: &str) {
        let mut parameters = range.split(';').map(str::trim_ascii);
        let Some((main, sub)) = parameters.next().and_then(|it| it.split_once('/')) else { return };
        let mut precision = match (main, sub) {
            ("*", "*") => 1,
            (main, "*") if main.eq_ignore_ascii_case(self.main) => 2,
            (main, sub)
                if main.eq_ignore_ascii_case(self.main) && sub.eq_ignore_ascii_case(self.sub) =>
            {
                NAMED
            }
            _ => return,
        };
        let mut weight = 1000;
        for (name, value) in parameters.filter_map(|it| it.split_once('=')) {
            let value = value.trim_matches('"');
            if name.eq_ignore_ascii_case("q") {
                let Some(quality) = quality(value) else { return };
                weight = quality;
            } else if name.eq_ignore_ascii_case("version") {
                if value != self.version {
                    return;
                }
                precision += 1;
            }
        }
        self.best = self.best.max((precision, weight));
    }
}

/// The members of a list with their weights, 0 to 1000. A member with a malformed weight is skipped: it must not count
/// as agreement.
fn weighted<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = (&'a str, u16)> {
    let lines = headers.get_all(name).into_iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).filter_map(|member| {
        let mut parameters = member.split(';').map(str::trim_ascii);
        let name = parameters.next().filter(|name| !name.is_empty())?;
        let weight = parameters.find_map(|it| it.strip_prefix("q=").or(it.strip_prefix("Q=")));
        Some((name, weight.map_or(Some(1000), quality)?))
    })
}

/// Parses a `qvalue` into thousandths: 0 to 1 with up to three digits (§12.4.2). Java leaves the 0 before the point out.
fn quality(text: &str) -> Option<u16> {
    let (whole, digits) = text.split_once('.').unwrap_or((text, ""));
    let valid = digits.len() <= 3 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let thousandths: u16 = format!("{digits:0<3}").parse().ok().filter(|_| valid)?;
    match whole {
        "0" => Some(thousandths),
        "" if !digits.is_empty() => Some(thousandths),
        "1" if thousandths == 0 => Some(1000),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn accepted(text: &'static str) -> (u16, u16, u16) {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(text));
        let AcceptedCodings { brotli, gzip, identity } = accepted_codings(&headers);
        (brotli, gzip, identity)
    }

    #[test]
    fn a_list_of_codings_is_read_with_its_weights() {
        assert_eq!(accepted_codings(&HeaderMap::new()), AcceptedCodings::UNSAID);
        assert_eq!(accepted("gzip, deflate, br, zstd"), (1000, 1000, 1));
        assert_eq!(accepted("GZIP;q=0.5 , br ; Q=0.25"), (250, 500, 1));
        assert_eq!(accepted("*"), (1000, 1000, 1000));
        assert_eq!(accepted("*;q=0, gzip;q=1.000"), (0, 1000, 0));
        assert_eq!(accepted("br;q=0, identity;q=0.5"), (0, 0, 500));
        assert_eq!(accepted(""), (0, 0, 1));
        assert_eq!(accepted("identity;q=0"), (0, 0, 0));
        assert_eq!(accepted("br;q=.5"), (500, 0, 1));
    }

    #[test]
    fn a_list_of_types_is_read_with_its_weights() {
        let types = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(text));
            let AcceptedTypes { named, rest, .. } = accepted_types(&headers, false);
            let named = MediaType::ALL.into_iter().zip(named);
            (named.filter_map(|(it, weight)| Some((it, weight?))).collect::<Vec<_>>(), rest)
        };
        let (png, gif, jpeg) = (MediaType::Png, MediaType::Gif, MediaType::Jpeg);
        assert_eq!(types("image/png;q=0.5, image/apng"), (vec![(png, 500)], 0));
        assert_eq!(types("image/apng, image/*;q=0.1, */*"), (vec![(png, 1000)], 100));
        assert_eq!(types("IMAGE/X-ICON"), (vec![(MediaType::Ico, 1000)], 0));
        let java = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2";
        assert_eq!(types(java), (vec![(jpeg, 1000), (gif, 1000)], 200));
    }

    #[test]
    fn openmetrics_is_for_those_who_name_it_and_prefer_nothing_else() {
        const PROMETHEUS_3: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
            application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
            text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        const PROMETHEUS_2_TEXT: &str = "text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for (accept, expected) in [
            (PROMETHEUS_3, Exposition::OpenMetrics),
            (PROMETHEUS_2_TEXT, Exposition::Text),
            ("application/openmetrics-text", Exposition::OpenMetrics),
            (
                "Application/OpenMetrics-Text; Version=\"1.0.0\"; charset=utf-8",
                Exposition::OpenMetrics,
            ),
            ("application/openmetrics-text, */*", Exposition::OpenMetrics),
            ("text/plain, application/openmetrics-text", Exposition::OpenMetrics),
            ("text/plain;q=0.9, application/openmetrics-text;q=0.8", Exposition::Text),
            ("text/plain;q=0.8, application/openmetrics-text;q=0.9", Exposition::OpenMetrics),
            ("application/openmetrics-text;q=0.3, */*;q=0.8", Exposition::Text),
            ("application/openmetrics-text;q=0, */*", Exposition::Text),
            ("application/openmetrics-text;version=1.0.0;q=0, application/*", Exposition::Text),
            ("application/openmetrics-text;q=2", Exposition::Text),
            ("application/openmetrics-text;version=0.0.1", Exposition::Text),
            ("application/*", Exposition::OpenMetrics),
            ("*/*", Exposition::Text),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", Exposition::Text),
            ("image/png", Exposition::Text),
            ("", Exposition::Text),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(accept).unwrap());
            assert_eq!(accepted_exposition(&headers), expected, "{accept}");
        }
        assert_eq!(accepted_exposition(&HeaderMap::new()), Exposition::Text);
    }

    #[test]
    fn a_malformed_weight_is_no_agreement() {
        for text in ["br;q=2", "br;q=1.001", "br;q=0.1234", "br;q=-1", "br;q=", "br;q=.", "br;q=x"]
        {
            assert_eq!(accepted(text).0, 0, "{text}");
        }
    }
}
