//! `put`: stores images as a backend would.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use bytes::Bytes;

use super::client::ServerAddress;
use super::images::{Access, Images, Life, Put};
use super::{Failures, is_dash, say};
use crate::decoder::Decoder;
use crate::image::{ImageId, MediaType, record};
use crate::picture::{self, PictureError, RenderLimits, sniff};
use crate::settings::{PictureSettings, Settings};

/// The images to store, as they are given: an id and a file, or files.
#[derive(Debug)]
pub(super) struct NewImages(pub(super) Vec<PathBuf>);

impl NewImages {
    /// Tells ids from files. A first word that is a file is one; otherwise it must be an id, before one file.
    fn name(self) -> anyhow::Result<Vec<(ImageId, PathBuf)>> {
        let NewImages(mut given) = self;
        if let [first, file] = &given[..] {
            let id = first.to_str().map(ImageId::parse);
            match (id, first.is_file() && !is_dash(file)) {
                (Some(Ok(id)), true) => anyhow::bail!(
                    "{id} is an id and a file here: write `put ./{id} …` for the file, or run this elsewhere for the id"
                ),
                (Some(Ok(id)), false) => return Ok(vec![(id, given.remove(1))]),
                (_, true) => {}
                (id, false) => {
                    let why = id.and_then(Result::err).map(|it| format!(" ({it})"));
                    anyhow::bail!(
                        "{} is neither an id{} nor a file that there is; write `put ID FILE`",
                        first.display(),
                        why.unwrap_or_default()
                    );
                }
            }
        }
        let mut named: HashMap<ImageId, PathBuf> = HashMap::new();
        let mut images = Vec::new();
        for file in given {
            anyhow::ensure!(!is_dash(&file), "standard input needs an id: write `put ID -`");
            let id = id_of(&file)?;
            if let Some(other) = named.insert(id.clone(), file.clone()) {
                anyhow::bail!(
                    "{} and {} would both be {id}: store one of them by `put ID FILE`",
                    other.display(),
                    file.display()
                );
            }
            images.push((id, file));
        }
        Ok(images)
    }
}

/// The id that a file's name makes: without its ending, and with a hyphen in place of each character that no id has.
fn id_of(file: &Path) -> anyhow::Result<ImageId> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let known = |it: char| it.is_ascii_alphanumeric() || "._:~-".contains(it);
    let text: String = stem.chars().map(|it| if known(it) { it } else { '-' }).collect();
    let text = text.trim_start_matches(|it: char| !(it.is_ascii_alphanumeric() || it == '_'));
    ImageId::parse(text).with_context(|| {
        format!("{} has no name that makes an id: write `put ID FILE`", file.display())
    })
}

pub(super) async fn run(
    settings: &Settings,
    images: NewImages,
    ttl: Option<Duration>,
    server: Option<ServerAddress>,
) -> anyhow::Result<()> {
    let images = images.name()?;
    let store = Images::open(settings, server, Access::Write).await?;
    let mut failures = Failures::default();
    for (id, file) in images {
        let stored = store_file(settings, &store, &id, &file, ttl).await;
        if let Err(error) = stored.and_then(|line| say(&line)) {
            failures.tell(&error);
        }
    }
    failures.end()
}

/// Stores one image, and returns the lines that tell of it.
async fn store_file(
    settings: &Settings,
    store: &Images,
    id: &ImageId,
    file: &Path,
    ttl: Option<Duration>,
) -> anyhow::Result<String> {
    let limit = settings.records.max_value;
    // One byte more than fits shows that there are too many.
    let most = limit as u64 + 1;
    let mut bytes = Vec::new();
    let name = if is_dash(file) {
        std::io::stdin().take(most).read_to_end(&mut bytes).context("can't read standard input")?;
        "standard input".to_owned()
    } else {
        let name = file.display().to_string();
        let read = File::open(file).and_then(|file| file.take(most).read_to_end(&mut bytes));
        read.with_context(|| format!("can't read {name}"))?;
        name
    };
    anyhow::ensure!(!bytes.is_empty(), "{name} is empty");
    let media_type = sniff::sniff(&bytes)
        .with_context(|| format!("{name} is not an image of a type that is served"))?;
    if settings.writes.verify {
        verify(&bytes, media_type, &settings.pictures)
            .with_context(|| format!("{name} was not stored"))?;
    }
    let value = Bytes::from(record::encode(&bytes, media_type, Some(SystemTime::now())));
    anyhow::ensure!(
        value.len() <= limit,
        "{name} makes a record of {} bytes; the limit is {limit} ([records] max_value)",
        value.len()
    );
    let put = store.put(settings, id, value, Life::Asked(ttl), true).await;
    let Put::Stored { url, .. } = put.with_context(|| format!("{name} was not stored"))? else {
        unreachable!("it replaces what is there");
    };
    let limits = RenderLimits { pixels: u64::MAX, deadline: None };
    let pixels = picture::dimensions(&bytes, media_type, limits)
        .map_or_else(|_unknown| String::new(), |(width, height)| format!(" {width}×{height}"));
    let ttl = match (ttl, store) {
        (None, Images::Server { .. }) => None,
        (ttl, _) => Some(ttl.unwrap_or(settings.records.ttl)),
    };
    let ttl = ttl.map(|it| format!(", for {}", humantime::format_duration(it)));
    Ok(format!(
        "{id}:{pixels} {}, {} bytes{}, in {}\n  {url}",
        media_type.as_str(),
        bytes.len(),
        ttl.unwrap_or_default(),
        store.place(),
    ))
}

/// Decodes a picture, as a server does before it stores one, and refuses a broken one.
fn verify(
    bytes: &[u8],
    media_type: MediaType,
    settings: &PictureSettings,
) -> Result<(), PictureError> {
    let deadline = Some(Instant::now() + settings.timeout);
    let limits = RenderLimits { pixels: settings.max_pixels, deadline };
    let previewed = Decoder::new(&settings.program)
        .readable(bytes, media_type, limits)
        .and_then(|(bytes, media_type)| picture::preview(&bytes, media_type, None, limits));
    match previewed {
        Err(broken @ PictureError::Broken(_)) => Err(broken),
        Ok(_) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_makes_an_id() {
        for (file, id) in [
            ("a/hero.png", "hero"),
            ("IMG 0001.JPG", "IMG-0001"),
            ("-été.jpg", "t-"),
            ("a.b.webp", "a.b"),
        ] {
            assert_eq!(id_of(Path::new(file)).unwrap().as_str(), id, "{file}");
        }
        assert!(id_of(Path::new("….png")).is_err());
        // The ending would be that of a variant's address.
        assert!(id_of(Path::new("a.png.png")).is_err());
    }

    #[test]
    fn words_are_an_id_and_a_file_or_files() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one.png", "two.png"].map(|it| dir.path().join(it));
        std::fs::write(&one, "").unwrap();
        std::fs::write(&two, "").unwrap();
        let ids = |given: &[&Path]| {
            let images = NewImages(given.iter().map(|it| it.to_path_buf()).collect()).name()?;
            anyhow::Ok(images.iter().map(|(id, _)| id.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(ids(&[&one]).unwrap(), ["one"]);
        assert_eq!(ids(&[&one, &two]).unwrap(), ["one", "two"]);
        assert_eq!(ids(&[Path::new("x"), &two]).unwrap(), ["x"]);
        // A file of this very folder, which may be meant as an id.
        let told = ids(&[Path::new("Cargo.toml"), &two]).unwrap_err().to_string();
        assert!(told.contains("is an id and a file here"), "{told}");
        assert_eq!(ids(&[Path::new("x"), Path::new("-")]).unwrap(), ["x"]);
        assert!(ids(&[Path::new("-")]).unwrap_err().to_string().contains("needs an id"));
        assert!(ids(&[&one, &one]).unwrap_err().to_string().contains("would both be one"));
        // A folder may have the name of an id, but no id is a path.
        assert!(ids(&[dir.path(), &two]).unwrap_err().to_string().contains("neither"));
        assert!(ids(&[Path::new("../x"), &two]).unwrap_err().to_string().contains("neither"));
    }
}
