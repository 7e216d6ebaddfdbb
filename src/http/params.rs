//! The parameters of an image's address: version, transform, and fallback.

use axum::extract::Query;
use axum::http::{HeaderMap, Uri};
use serde::Deserialize;
use url::form_urlencoded;

use super::negotiation;
use super::problem::{Problem, ProblemKind};
use crate::image::bounds::{Bounds, Fit};
use crate::image::variant::{Format, RequestedFormat, Transform};
use crate::settings::PictureSettings;

/// The parameters as they stand in the query.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawParams {
    v: Option<String>,
    w: Option<String>,
    h: Option<String>,
    fit: Option<String>,
    q: Option<String>,
    dpr: Option<String>,
    format: Option<String>,
    fallback: Option<String>,
}

/// The parameters, parsed.
#[derive(Debug, Default)]
pub(crate) struct ImageParams {
    /// The version or entity-tag that the address names with `v`; empty if it isn't written plainly.
    pub(crate) version: Option<String>,
    /// The transform; `None` for the image as it is.
    pub(crate) transform: Option<Transform>,
    /// True if a drawn placeholder is to stand in for an absent image.
    pub(crate) placeholder: bool,
}

/// Splits the text in a path into id and file name extension.
pub(crate) fn split_format<'a>(
    text: &'a str,
    allowed: &PictureSettings,
) -> Result<(&'a str, Option<Format>), Problem> {
    let split = Format::ALL.into_iter().find_map(|format| {
        let id = text.strip_suffix(format.name())?.strip_suffix('.')?;
        Some((id, format))
    });
    match split {
        Some((_, Format::Avif)) if !allowed.avif => {
            let detail = "this server makes no AVIF ([pictures] avif): ask for .webp, .jpg or .png";
            Err(Problem::new(ProblemKind::NotAcceptable, detail))
        }
        Some((id, format)) => Ok((id, Some(format))),
        None => Ok((text, None)),
    }
}

/// True for an address whose answers depend on `Accept`, even if something else is wrong with it. It is decoded first:
/// `format=%61uto` means the same.
pub(crate) fn is_negotiated(uri: &Uri) -> bool {
    let query = uri.query().unwrap_or_default();
    form_urlencoded::parse(query.as_bytes())
        .any(|(name, value)| name == "format" && value == "auto")
}

/// True for a query without empty parameters, and with `v` as servers and pages write it: digits, letters and hyphens,
/// perhaps between two quotes. Anything else may mean the same in endlessly many ways, and each of these addresses would
/// stay in caches for a year.
fn is_written_plainly(query: &str) -> bool {
    query.split('&').all(|pair| !pair.is_empty())
        && query.split('&').filter_map(|pair| pair.strip_prefix("v=")).any(|version| {
            let quoted = version.strip_prefix("%22").and_then(|it| it.strip_suffix("%22"));
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
            quoted.unwrap_or(version).bytes().all(is_plain)
        })
}

/// Parses the parameters of an address. Unknown ones are refused: if they were ignored, caches would keep the original
/// under that address for an hour.
pub(crate) fn parse(
    uri: &Uri,
    extension: Option<Format>,
    headers: &HeaderMap,
    allowed: &PictureSettings,
) -> Result<ImageParams, Problem> {
    let raw = match uri.query() {
        None | Some("") if extension.is_none() => return Ok(ImageParams::default()),
        None => RawParams::default(),
        Some(_) => match Query::<RawParams>::try_from_uri(uri) {
            Ok(Query(raw)) => raw,
            Err(rejection) => {
                let takes = "this address takes v, w, h, fit, q, dpr, format and fallback";
                let detail = format!("{}; {takes}", rejection.body_text());
                return Err(Problem::bad_parameter(detail));
            }
        },
    };
    let placeholder = match raw.fallback.as_deref() {
        None => false,
        Some("placeholder") => true,
        Some(_) => return Err(Problem::bad_parameter("`fallback` must be `placeholder`")),
    };
    let transform = transform(&raw, extension, headers, allowed)?;
    let is_plain = uri.query().is_some_and(is_written_plainly);
    let version = raw.v.map(|version| if is_plain { version } else { String::new() });
    Ok(ImageParams { version, transform, placeholder })
}

fn transform(
    raw: &RawParams,
    extension: Option<Format>,
    headers: &HeaderMap,
    allowed: &PictureSettings,
) -> Result<Option<Transform>, Problem> {
    let RawParams { w, h, fit, q, dpr, format, .. } = raw;
    let format = match (format.as_deref(), extension) {
        (Some(_), Some(_)) => {
            let detail = "the address names a format twice: keep either the extension or `format`";
            return Err(Problem::bad_parameter(detail));
        }
        (None, Some(format)) => Some(RequestedFormat::Exactly(format)),
        (None, None) => None,
        (Some("auto"), None) => {
            let accepted = negotiation::accepted_types(headers, allowed.avif);
            Some(RequestedFormat::Negotiated(accepted))
        }
        (Some(name), None) => {
            let enabled = |it: &Format| allowed.avif || *it != Format::Avif;
            let known = Format::ALL.into_iter().filter(enabled).find(|it| it.name() == name);
            let unknown = || {
                Problem::bad_parameter(if allowed.avif {
                    "`format` must be `auto`, `avif`, `webp`, `jpg` or `png`"
                } else {
                    "`format` must be `auto`, `webp`, `jpg` or `png`; [pictures] avif is off"
                })
            };
            Some(RequestedFormat::Exactly(known.ok_or_else(unknown)?))
        }
    };
    let dpr = one_of("`dpr`", dpr.as_deref(), &allowed.dprs, "dprs")?;
    let width = one_of("`w`", w.as_deref(), &allowed.widths, "widths")?;
    let height = one_of("`h`", h.as_deref(), &allowed.heights, "heights")?;
    let quality = one_of("`q`", q.as_deref(), &allowed.qualities, "qualities")?;
    let fit = match fit.as_deref() {
        None | Some("contain") => Fit::Contain,
        Some("cover") => Fit::Cover,
        Some("fill") => Fit::Fill,
        Some(_) => {
            return Err(Problem::bad_parameter("`fit` must be `contain`, `cover` or `fill`"));
        }
    };
    if format.is_none() && width.is_none() && height.is_none() && quality.is_none() {
        return Ok(None);
    }
    let times = |length: u32| length * dpr.unwrap_or(1);
    Ok(Some(Transform {
        bounds: Bounds { width: width.map(times), height: height.map(times), fit, enlarge: false },
        format: format.unwrap_or(RequestedFormat::Kept),
        quality: quality.and_then(|quality| u8::try_from(quality).ok()),
        default_quality: allowed.default_quality,
        effort: Transform::EFFORT,
    }))
}

/// Parses a number that is in the list of a setting in `[pictures]`.
pub(crate) fn one_of(
    name: &str,
    text: Option<&str>,
    allowed: &[u32],
    setting: &str,
) -> Result<Option<u32>, Problem> {
    let Some(text) = text else {
        return Ok(None);
    };
    let number = text.parse().ok().filter(|number| allowed.contains(number));
    number.map(Some).ok_or_else(|| {
        let list: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        Problem::bad_parameter(format!(
            "{name} must be one of {} ([pictures] {setting})",
            list.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_negotiated_however_its_format_is_written() {
        for (query, negotiated) in [
            ("format=auto", true),
            ("w=64&format=auto", true),
            ("format=%61uto", true),
            ("f%6Frmat=aut%6f&w=1", true),
            ("format=auto2", false),
            ("xformat=auto", false),
            ("format=webp", false),
            ("format%3Dauto", false),
        ] {
            let uri = format!("/images/a?{query}").parse().unwrap();
            assert_eq!(is_negotiated(&uri), negotiated, "{query}");
        }
    }

    #[test]
    fn a_version_counts_only_as_it_is_usually_written() {
        for (query, plain) in [
            ("v=5d41", true),
            ("w=64&v=5d41-w64-png1", true),
            ("v=%225d41%22", true),
            ("v=%35d41", false),
            ("%76=5d41", false),
            ("v=5d41&", false),
            ("v=5d41&&w=64", false),
            ("v=%22%225d41%22%22", false),
        ] {
            assert_eq!(is_written_plainly(query), plain, "{query}");
        }
    }
}
