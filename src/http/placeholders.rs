//! Drawn placeholders: at addresses of their own, and in place of absent images.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Method, Uri};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::params::one_of;
use super::problem::Problem;
use super::representation;
use super::state::HttpState;
use super::{CACHE_STATUS, SERVER_TIMING, conditional};
use crate::image::MediaType;
use crate::image::bounds::Bounds;
use crate::image::preconditions::Verdict;
use crate::image::variant::Transform;
use crate::peer::Client;
use crate::picture::placeholder::{Background, MAX_TEXT, Placeholder, parse_colour};
use crate::render::RenderError;
use crate::settings::PictureSettings;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlaceholderParams {
    text: Option<String>,
    bg: Option<String>,
    fg: Option<String>,
}

/// `GET` and `HEAD /placeholders/{width}x{height}`.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    Extension(client): Extension<Client>,
    method: Method,
    uri: Uri,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let dimensions = path.map(|Path(dimensions)| dimensions).unwrap_or_default();
    let placeholder = parse(&dimensions, &uri, &state.app.settings.pictures)?;
    Ok(drawn(&state, client, &method, &headers, placeholder).await?)
}

/// The thumbnail of an image that can't be decoded: the name of its type.
pub(crate) async fn thumbnail(
    state: &HttpState,
    client: Client,
    method: &Method,
    headers: &HeaderMap,
    media_type: MediaType,
) -> Result<Response, RenderError> {
    let Bounds { width, height, .. } = Transform::THUMBNAIL.bounds;
    let placeholder = Placeholder {
        width: width.unwrap_or_default(),
        height: height.unwrap_or_default(),
        background: Background::default(),
        text_colour: None,
        text: Some(media_type.extension().to_uppercase()),
    };
    drawn(state, client, method, headers, placeholder).await
}

/// The answer with a drawn placeholder.
async fn drawn(
    state: &HttpState,
    client: Client,
    method: &Method,
    headers: &HeaderMap,
    placeholder: Placeholder,
) -> Result<Response, RenderError> {
    let rendered = state.app.renderer.placeholder(Some(client.share()), placeholder).await?;
    let (source, timing) = (rendered.cache_status(), representation::render_timing(rendered.time));
    let (metadata, body) = (&rendered.product.metadata, rendered.product.body);
    let mut response = match conditional::preconditions(headers).evaluate(metadata) {
        Verdict::NotModified => representation::not_modified(metadata),
        Verdict::Failed => representation::precondition_failed(metadata),
        Verdict::Proceed if *method == Method::HEAD => {
            representation::whole(metadata, Body::empty())
        }
        Verdict::Proceed => representation::requested_part(headers, metadata, body),
    };
    let cacheable = response.status().is_success() || response.status().is_redirection();
    let headers = response.headers_mut();
    if cacheable {
        headers.insert(CACHE_CONTROL, state.fresh.clone());
    }
    headers.insert(CACHE_STATUS, representation::cache_status(source));
    headers.insert(SERVER_TIMING, timing);
    Ok(response)
}

fn parse(dimensions: &str, uri: &Uri, allowed: &PictureSettings) -> Result<Placeholder, Problem> {
    let (width, height) = dimensions.split_once('x').unwrap_or((dimensions, ""));
    let width = one_of("the width", Some(width), &allowed.widths, "widths")?.unwrap_or_default();
    let height =
        one_of("the height", Some(height), &allowed.heights, "heights")?.unwrap_or_default();
    let parameters = match Query::<PlaceholderParams>::try_from_uri(uri) {
        Ok(Query(parameters)) => parameters,
        Err(rejection) => {
            let detail = format!("{}; this address takes text, bg and fg", rejection.body_text());
            return Err(Problem::bad_parameter(detail));
        }
    };
    if let Some(text) = &parameters.text
        && text.chars().count() > MAX_TEXT
    {
        return Err(Problem::bad_parameter(format!(
            "`text` must have at most {MAX_TEXT} characters"
        )));
    }
    let colour = |name: &str, text: &str| {
        let wrong =
            || Problem::bad_parameter(format!("`{name}` must be a colour such as f80 or ff8800"));
        parse_colour(text).ok_or_else(wrong)
    };
    let background = match parameters.bg.as_deref().map(|text| text.split_once(',').ok_or(text)) {
        None => Background::default(),
        Some(Ok((from, to))) => Background::Gradient(colour("bg", from)?, colour("bg", to)?),
        Some(Err(plain)) => Background::Plain(colour("bg", plain)?),
    };
    let text_colour = parameters.fg.as_deref().map(|text| colour("fg", text)).transpose()?;
    Ok(Placeholder { width, height, background, text_colour, text: parameters.text })
}

/// The error answer for an absent image with a placeholder as its body, which a page shows in place of the image. The
/// status stays, and caches don't keep it.
pub(crate) async fn in_place(
    state: &HttpState,
    client: Client,
    problem: Problem,
    transform: Option<Transform>,
) -> Response {
    /// The length of a side that the address doesn't name.
    const SIDE: u32 = 512;
    let bounds = transform.map(|transform| transform.bounds);
    let pixels = |length: Option<u32>| length.unwrap_or(SIDE).min(crate::settings::MAX_LENGTH);
    let placeholder = Placeholder {
        width: pixels(bounds.and_then(|it| it.width.or(it.height))),
        height: pixels(bounds.and_then(|it| it.height.or(it.width))),
        background: Background::default(),
        text_colour: None,
        text: Some(String::new()),
    };
    let drawn = state.app.renderer.placeholder(Some(client.share()), placeholder).await;
    let mut response = problem.into_response();
    if let Ok(rendered) = drawn {
        let body = rendered.product.body;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MediaType::WebP.as_str()));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        *response.body_mut() = Body::from(body);
    }
    response
}
