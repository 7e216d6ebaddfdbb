//! `GET` and `HEAD` of images and thumbnails.

use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::VARY;
use axum::http::{HeaderMap, HeaderValue, Method, Uri};
use axum::response::{IntoResponse, Response};

use super::params::{self, ImageParams};
use super::problem::Problem;
use super::state::HttpState;
use super::{conditional, negotiation, placeholders, representation};
use crate::image::ImageId;
use crate::image::variant::Transform;
use crate::peer::Client;
use crate::read::{ImageRequest, ReadFailure, Want};

/// For an address that leaves the format to the server.
const BY_ENCODING_AND_TYPE: HeaderValue = HeaderValue::from_static("Accept-Encoding, Accept");

/// `GET` and `HEAD /images/{id}`, `/images/{id}.webp` and so on.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    Extension(client): Extension<Client>,
    method: Method,
    uri: Uri,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Response {
    let text = path.map_err(|rejection| Problem::bad_id(&rejection.body_text()));
    let answer = async {
        let Path(text) = text?;
        let allowed = &state.app.settings.pictures;
        let (id, extension) = params::split_format(&text, allowed)?;
        let id = parse_id(id)?;
        let parameters = params::parse(&uri, extension, &headers, allowed)?;
        Ok::<_, Problem>(answer(&state, client, &method, &headers, id, parameters).await)
    };
    let mut response = answer.await.unwrap_or_else(IntoResponse::into_response);
    if params::is_negotiated(&uri) {
        response.headers_mut().insert(VARY, BY_ENCODING_AND_TYPE);
    }
    response
}

/// `GET` and `HEAD /images/{id}/thumbnail`.
pub(crate) async fn thumbnail(
    State(state): State<Arc<HttpState>>,
    Extension(client): Extension<Client>,
    method: Method,
    uri: Uri,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id = id(path)?;
    let parameters = params::parse(&uri, None, &headers, &state.app.settings.pictures)?;
    if parameters.transform.is_some() {
        return Err(Problem::bad_parameter("this address takes the parameters `v` and `fallback`"));
    }
    let parameters = ImageParams { transform: Some(Transform::THUMBNAIL), ..parameters };
    match read(&state, client, &method, &headers, &id, &parameters).await {
        Ok(response) => Ok(response),
        Err(ReadFailure { error, .. }) if let Some(media_type) = error.unconverted_type() => {
            let drawn = placeholders::thumbnail(&state, client, &method, &headers, media_type);
            Ok(drawn.await?)
        }
        Err(failure) => Ok(representation::failed(&state, client, &parameters, failure).await),
    }
}

async fn answer(
    state: &HttpState,
    client: Client,
    method: &Method,
    headers: &HeaderMap,
    id: ImageId,
    parameters: ImageParams,
) -> Response {
    match read(state, client, method, headers, &id, &parameters).await {
        Ok(response) => response,
        Err(failure) => representation::failed(state, client, &parameters, failure).await,
    }
}

/// Reads an image for a request.
async fn read(
    state: &HttpState,
    client: Client,
    method: &Method,
    headers: &HeaderMap,
    id: &ImageId,
    parameters: &ImageParams,
) -> Result<Response, ReadFailure> {
    let request = ImageRequest {
        id: id.clone(),
        client: Some(client.share()),
        want: if method == Method::HEAD { Want::Metadata } else { Want::Body },
        preconditions: conditional::preconditions(headers),
        accepts: negotiation::accepted_codings(headers),
        transform: parameters.transform,
    };
    let answer = state.app.reader.image(request).await?;
    Ok(representation::answered(state, headers, id, parameters.version.as_deref(), answer))
}

/// The id in the path, after one percent-decoding. An id that isn't UTF-8 then is a bad id.
pub(crate) fn id(path: Result<Path<String>, PathRejection>) -> Result<ImageId, Problem> {
    let Path(text) = path.map_err(|rejection| Problem::bad_id(&rejection.body_text()))?;
    parse_id(&text)
}

fn parse_id(text: &str) -> Result<ImageId, Problem> {
    ImageId::parse(text).map_err(|invalid| Problem::bad_id(&invalid))
}
