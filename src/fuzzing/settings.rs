//! The settings: their file, the environment and the command line.

use std::ffi::OsString;

use serde::de::DeserializeOwned;
use toml::de::ValueDeserializer;

use crate::cli::{self, Exit};
use crate::settings::{self, HostNames, PictureSettings, Settings, SettingsError, TrustedProxies};

/// Reads a value or a section. The whole of the settings would take most of a target's time.
pub(super) fn value<T: DeserializeOwned>(text: &str) -> T {
    T::deserialize(ValueDeserializer::parse(text).expect("TOML")).expect("a valid value")
}

/// Names of hosts that are the server's own.
pub(super) fn hosts() -> HostNames {
    value(r#"["images.example", "b"]"#)
}

/// Proxies that are trusted, 127.0.0.1 among them.
pub(super) fn proxies() -> TrustedProxies {
    value(r#"["127.0.0.1", "10.0.0.0/8"]"#)
}

/// Variants that may be requested.
pub(super) fn pictures() -> PictureSettings {
    value(
        "{ widths = [64, 320], heights = [64, 200], dprs = [1, 2, 3], qualities = [50, 80], \
         default_quality = 85, avif = true, max_pixels = 1000000, max_animation_frames = 20, \
         max_animation_pixels = 1000000, timeout = '2s' }",
    )
}

/// A settings file that is accepted means the same when it is written in full; one that is refused says where.
pub fn settings_file(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let loaded = settings::from_file("a.toml", text).and_then(|it| Settings::load_with_table(&it));
    match loaded {
        Ok((_, table)) => check_table(&table),
        Err(error) => check_error(&error, "a.toml"),
    }
}

/// The value of a variable is accepted or refused with its name.
pub fn environment(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let variables: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let layers = settings::from_environment(variables.into_iter());
    match layers.and_then(|it| Settings::load_with_table(&it)) {
        Ok((_, table)) => check_table(&table),
        Err(error) => check_error(&error, ""),
    }
}

/// A command line, an argument a line, has settings that are accepted or refused; it ends with success or as wrong usage.
pub fn command_line(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let arguments = std::iter::once("afterimage").chain(text.lines()).map(OsString::from);
    match cli::parse_settings(arguments, Vec::new()) {
        Ok(table) => table.iter().for_each(check_table),
        Err(Exit::Usage(error)) => {
            assert!(matches!(error.exit_code(), 0 | 2), "{error}");
            assert!(!error.to_string().is_empty());
        }
        Err(Exit::Settings(error)) => assert!(cli::describe(&error).contains("--"), "{error}"),
    }
}

/// Checks that settings mean the same after they were written to a file.
fn check_table(table: &toml::Table) {
    let text = toml::to_string(table).expect("settings can be written");
    let again = settings::from_file("again.toml", &text);
    let again = again.and_then(|it| Settings::load_with_table(&it));
    let (_, again) = again.unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(&again, table);
}

/// Checks that an error says where the fault is.
fn check_error(error: &SettingsError, named: &str) {
    match error {
        SettingsError::Syntax { place, .. } => assert!(place.starts_with(named), "{error}"),
        SettingsError::UnknownKey { place, key, .. }
        | SettingsError::BadValue { place, key, .. } => {
            assert!(place.starts_with(named), "{error}");
            assert!(error.to_string().contains(key.as_str()), "{error}");
        }
        SettingsError::Renamed { place, old, new } => {
            assert!(place.starts_with(named) && old != new, "{error}");
        }
    }
}
