//! What an address of an image asks for beside its id: a version, a variant, and what to show in its absence.

use axum::extract::Query;
use axum::http::{HeaderMap, StatusCode, Uri};
use serde::Deserialize;

use super::negotiation;
use super::problem::Problem;
use crate::image::variant::{Format, RequestedFormat, Transform};
use crate::picture::resize::{Bounds, Fit};
use crate::settings::PictureSettings;

/// The parameters as they are written.
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

/// What they mean.
#[derive(Debug, Default)]
pub(crate) struct ImageParams {
    /// The version that the address was made for.
    pub(crate) version: Option<String>,
    /// The variant, if it isn't the image as it is.
    pub(crate) transform: Option<Transform>,
    /// Whether a drawn placeholder is shown where there is no image.
    pub(crate) placeholder: bool,
}

/// An id in a path, with the format that its end names.
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
            let detail = "AVIF isn't written here ([pictures] avif): ask for .webp, .jpg or .png";
            let status = StatusCode::NOT_ACCEPTABLE;
            Err(Problem::new(status, "not-acceptable", "not acceptable", detail))
        }
        Some((id, format)) => Ok((id, Some(format))),
        None => Ok((text, None)),
    }
}

/// Whether the answers under an address depend on `Accept`, whatever else is wrong with it.
pub(crate) fn is_negotiated(uri: &Uri) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|it| it == "format=auto"))
}

/// The parameters of an address. An unknown one is refused: ignored, it would be answered with the original, which
/// caches keep for an hour under that address.
pub(crate) fn parse(
    uri: &Uri,
    extension: Option<Format>,
    headers: &HeaderMap,
    allowed: &PictureSettings,
) -> Result<ImageParams, Problem> {
    let written = match uri.query() {
        None | Some("") if extension.is_none() => return Ok(ImageParams::default()),
        None => RawParams::default(),
        Some(_) => match Query::<RawParams>::try_from_uri(uri) {
            Ok(Query(written)) => written,
            Err(rejection) => {
                let takes = "this address takes v, w, h, fit, q, dpr, format and fallback";
                let detail = format!("{}; {takes}", rejection.body_text());
                return Err(Problem::bad_parameter(detail));
            }
        },
    };
    let placeholder = match written.fallback.as_deref() {
        None => false,
        Some("placeholder") => true,
        Some(_) => return Err(Problem::bad_parameter("fallback is placeholder")),
    };
    let transform = transform(&written, extension, headers, allowed)?;
    Ok(ImageParams { version: written.v, transform, placeholder })
}

fn transform(
    written: &RawParams,
    extension: Option<Format>,
    headers: &HeaderMap,
    allowed: &PictureSettings,
) -> Result<Option<Transform>, Problem> {
    let RawParams { w, h, fit, q, dpr, format, .. } = written;
    let format = match (format.as_deref(), extension) {
        (Some(_), Some(_)) => {
            let detail = "the address names a format twice: at its end and by the parameter format";
            return Err(Problem::bad_parameter(detail));
        }
        (None, Some(format)) => Some(RequestedFormat::Exactly(format)),
        (None, None) => None,
        (Some("auto"), None) => {
            let mut accepted = negotiation::accepted_types(headers);
            if !allowed.avif {
                accepted.forget(Format::Avif);
            }
            Some(RequestedFormat::Negotiated(accepted))
        }
        (Some(name), None) => {
            let written = |it: &Format| allowed.avif || *it != Format::Avif;
            let known = Format::ALL.into_iter().filter(written).find(|it| it.name() == name);
            let unknown = || {
                Problem::bad_parameter(
                    "format is auto, webp, jpg or png, or avif where [pictures] has it",
                )
            };
            Some(RequestedFormat::Exactly(known.ok_or_else(unknown)?))
        }
    };
    let dpr = one_of("dpr", dpr.as_deref(), &allowed.dprs)?;
    let width = one_of("w", w.as_deref(), &allowed.widths)?;
    let height = one_of("h", h.as_deref(), &allowed.heights)?;
    let quality = one_of("q", q.as_deref(), &allowed.qualities)?;
    let fit = match fit.as_deref() {
        None | Some("contain") => Fit::Contain,
        Some("cover") => Fit::Cover,
        Some("fill") => Fit::Fill,
        Some(_) => return Err(Problem::bad_parameter("fit is contain, cover or fill")),
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

/// A number, if it is among those that anyone may ask for.
pub(crate) fn one_of(
    name: &str,
    text: Option<&str>,
    allowed: &[u32],
) -> Result<Option<u32>, Problem> {
    let Some(text) = text else {
        return Ok(None);
    };
    let number = text.parse().ok().filter(|number| allowed.contains(number));
    number.map(Some).ok_or_else(|| {
        let list: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        Problem::bad_parameter(format!("{name} is one of {} ([pictures])", list.join(", ")))
    })
}
