//! `list`: the images in the store.

use std::time::Duration;

use super::client::ServerAddress;
use super::images::{Access, Images, Listed};
use super::{Reader, print};
use crate::settings::Settings;

/// The options of `list`.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) prefix: String,
    pub(super) ids_alone: bool,
    pub(super) server: Option<ServerAddress>,
}

/// Narrowest column of ids.
const NARROWEST: usize = 24;

pub(super) async fn run(settings: &Settings, options: Options) -> anyhow::Result<()> {
    let store = Images::open(settings, options.server, Access::Read).await?;
    let (mut from, mut is_first) = (None::<String>, true);
    loop {
        let mut page = store.list(&options.prefix, from.as_deref()).await?;
        page.images.sort_by(|one, other| one.id.cmp(&other.id));
        let mut text = String::new();
        let width = page.images.iter().map(|it| it.id.len()).max().unwrap_or(0).max(NARROWEST);
        if is_first && !page.images.is_empty() {
            if !options.ids_alone {
                text += &row(width, "ID", "EXPIRES IN", "BYTES", "IMAGE");
            }
            is_first = false;
        }
        for image in &page.images {
            if options.ids_alone {
                text += &image.id;
                text.push('\n');
            } else {
                text += &line(width, image);
            }
        }
        if print(text.as_bytes())? == Reader::Gone {
            return Ok(());
        }
        from = page.next;
        if from.is_none() {
            if is_first {
                eprintln!("afterimage: no images in {}", store.place());
            }
            return Ok(());
        }
    }
}

fn line(width: usize, image: &Listed) -> String {
    let expires = image
        .expires_in
        .map(Duration::from_secs)
        .map_or_else(|| "never".to_owned(), |left| humantime::format_duration(left).to_string());
    let bytes = image.bytes.map(|it| it.to_string()).unwrap_or_default();
    let pixels = match (image.width, image.height) {
        (Some(width), Some(height)) => format!("{width}×{height} "),
        _ => String::new(),
    };
    let about = match (&image.reason, &image.media_type) {
        (Some(reason), _) => format!("broken: {reason}"),
        (None, media_type) => format!("{pixels}{}", media_type.as_deref().unwrap_or_default()),
    };
    row(width, &image.id, &expires, &bytes, &about)
}

fn row(width: usize, id: &str, expires: &str, bytes: &str, about: &str) -> String {
    let row = format!("{id:<width$}  {expires:<14}  {bytes:>10}  {about}");
    format!("{}\n", row.trim_end())
}
