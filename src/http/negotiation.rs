//! Parses the preferences of a client (RFC 9110 §12): lists with quality values.

use axum::http::header::{ACCEPT, ACCEPT_ENCODING};
use axum::http::{HeaderMap, HeaderName};

use crate::image::coding::AcceptedCodings;
use crate::image::variant::{AcceptedTypes, Format};

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

/// Parses the image types of `Accept` (§12.5.1). Malformed members are skipped.
pub(crate) fn accepted_types(headers: &HeaderMap) -> AcceptedTypes {
    if !headers.contains_key(ACCEPT) {
        return AcceptedTypes { named: [None; Format::ALL.len()], rest: 1000 };
    }
    let (mut named, mut images, mut all) = ([None; Format::ALL.len()], None, None);
    for (name, weight) in weighted(headers, &ACCEPT) {
        let format = Format::ALL.iter().position(|format| format.media_type().is_named(name));
        match format {
            Some(index) => named[index] = Some(weight),
            None if name.eq_ignore_ascii_case("image/*") => images = Some(weight),
            None if name == "*/*" => all = Some(weight),
            None => {}
        }
    }
    AcceptedTypes { named, rest: images.or(all).unwrap_or(0) }
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

/// Parses a `qvalue` into thousandths: 0 to 1 with up to three digits (§12.4.2).
fn quality(text: &str) -> Option<u16> {
    let (whole, digits) = text.split_once('.').unwrap_or((text, ""));
    let valid = digits.len() <= 3 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let thousandths: u16 = format!("{digits:0<3}").parse().ok().filter(|_| valid)?;
    match whole {
        "0" => Some(thousandths),
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
    }

    #[test]
    fn a_malformed_weight_is_no_agreement() {
        for text in ["br;q=2", "br;q=1.001", "br;q=0.1234", "br;q=-1", "br;q=", "br;q=.5", "br;q=x"]
        {
            assert_eq!(accepted(text).0, 0, "{text}");
        }
    }
}
