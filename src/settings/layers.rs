//! The layers that settings come from, and the errors that name the layer at fault.
//!
//! `config/afterimage.toml` is compiled in and is the only place where a default, a setting's name or its description is
//! written. A settings file, the environment and the flags are layers of [`Override`]s over it. All are checked in the
//! same way, so that each error names the key, where it was given and what was expected there.

use std::net::{Ipv4Addr, SocketAddr};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::{ListenOn, Settings};

/// The shipped settings file: defaults, names and descriptions.
pub const SHIPPED: &str = include_str!("../../config/afterimage.toml");

/// A setting given in a file, a variable or a flag.
#[derive(Debug, Clone)]
pub struct Override {
    /// Its dotted name, such as `cache.images`.
    pub key: String,
    /// Its value.
    pub value: toml::Value,
    /// The place for error messages: `afterimage.toml:12`, `AFTERIMAGE_CACHE_IMAGES`.
    pub place: String,
}

/// Refusal of the settings.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The settings file isn't TOML.
    #[error("{place}: the file must be TOML: {message}")]
    Syntax {
        /// File and line.
        place: String,
        /// The parser's message.
        message: String,
    },
    /// No setting has this key.
    #[error("{place}: there is no setting `{key}`; {}", hint(nearest.as_deref()))]
    UnknownKey {
        /// Place of the override.
        place: String,
        /// The name that was given.
        key: String,
        /// The setting that was probably meant.
        nearest: Option<String>,
    },
    /// The setting has been renamed.
    #[error("{place}: the setting `{old}` is now called `{new}`")]
    Renamed {
        /// Place of the override.
        place: String,
        /// The name that was given.
        old: String,
        /// The name that the setting has now.
        new: &'static str,
    },
    /// The value doesn't fit the setting.
    #[error("{place}: bad value for `{key}`: {expected}")]
    BadValue {
        /// Place of the override.
        place: String,
        /// The setting's name.
        key: String,
        /// Description of the value and of what was expected.
        expected: String,
    },
}

/// A setting, as the shipped file describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct SettingInfo {
    /// The dotted name.
    pub key: String,
    /// The comment above it.
    pub help: String,
    /// The default.
    pub default: toml::Value,
}

impl SettingInfo {
    /// The environment variable that overrides the setting.
    #[must_use]
    pub fn variable(&self) -> String {
        variable(&self.key)
    }

    /// The flag that overrides the setting, without the leading dashes.
    #[must_use]
    pub fn flag(&self) -> String {
        flag(&self.key)
    }

    /// An override of this setting by text from a variable or a flag.
    ///
    /// Text for a setting that isn't a string is read as TOML. If it isn't TOML it stays text, and the setting's type
    /// refuses it with a message of its own.
    #[must_use]
    pub fn overridden(&self, text: &str, place: String) -> Override {
        let value = match self.default {
            toml::Value::String(_) => None,
            _ => toml::from_str::<toml::Table>(&format!("v = {text}"))
                .ok()
                .and_then(|mut table| table.remove("v")),
        };
        Override {
            key: self.key.clone(),
            value: value.unwrap_or_else(|| toml::Value::String(text.to_owned())),
            place,
        }
    }
}

/// The names that settings had before: old key, new key.
const RENAMED: [(&str, &str); 4] = [
    ("cache.stale_if_error", "cache.serve_stale_for"),
    ("cache.known", "cache.index_entries"),
    ("limits.streams", "limits.h2_streams"),
    ("events.streams", "events.connections"),
];

/// Former names of settings, with their flags: the command line refuses them as the file does.
pub fn renamed() -> impl Iterator<Item = (&'static str, String)> {
    RENAMED.iter().map(|(old, _)| (*old, flag(old)))
}

fn variable(key: &str) -> String {
    format!("AFTERIMAGE_{}", key.replace('.', "_").to_uppercase())
}

fn flag(key: &str) -> String {
    key.replace(['.', '_'], "-")
}

/// All settings, in the order of the shipped file.
#[must_use]
pub fn described() -> Vec<SettingInfo> {
    let defaults = defaults();
    let (mut section, mut help, mut all) = (String::new(), String::new(), Vec::new());
    for line in SHIPPED.lines() {
        if let Some(comment) = line.strip_prefix('#') {
            help.push_str(comment);
        } else if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            name.clone_into(&mut section);
        } else if let Some((name, _)) = line.split_once(" = ") {
            if let Some(default) = defaults.get(&section).and_then(|table| table.get(name)) {
                all.push(SettingInfo {
                    key: format!("{section}.{name}"),
                    help: help.trim().to_owned(),
                    default: default.clone(),
                });
            }
        } else {
            help.clear();
        }
    }
    all
}

/// Names the setting that was probably meant, or where all are listed.
fn hint(nearest: Option<&str>) -> String {
    match nearest {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => "`afterimage config` prints all settings".to_owned(),
    }
}

/// Returns the name that is most like a given one, if one is like it.
fn nearest(given: &str, names: impl Iterator<Item = String>) -> Option<String> {
    const LEAST: f64 = 0.7;
    let likeness = names.map(|name| (strsim::normalized_damerau_levenshtein(given, &name), name));
    let (likeness, name) = likeness.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
    (likeness >= LEAST).then_some(name)
}

impl SettingsError {
    fn no_such_key(place: String, key: String) -> SettingsError {
        if let Some((_, new)) = RENAMED.iter().find(|(old, _)| *old == key) {
            return SettingsError::Renamed { place, old: key, new };
        }
        // A right name in the wrong section is nearer than any other in the same one.
        let all = described().into_iter().map(|it| it.key);
        let (_, name) = key.split_once('.').unwrap_or(("", &key));
        let moved = all.clone().find(|it| it.split_once('.').is_some_and(|(_, it)| it == name));
        let nearest = moved.or_else(|| nearest(&key, all));
        SettingsError::UnknownKey { place, key, nearest }
    }

    fn no_such_variable(name: &str) -> SettingsError {
        if let Some((old, _)) = RENAMED.iter().find(|(old, _)| variable(old) == name) {
            return SettingsError::no_such_key(name.to_owned(), (*old).to_owned());
        }
        // By what they don't have in common.
        let given = name.trim_start_matches("AFTERIMAGE_").to_lowercase();
        let nearest = nearest(&given, described().into_iter().map(|it| it.key.replace('.', "_")));
        let nearest = nearest.map(|name| variable(&name));
        SettingsError::UnknownKey { place: "environment".to_owned(), key: name.to_owned(), nearest }
    }
}

impl Settings {
    /// Applies the overrides to the defaults, in order: later ones win.
    pub fn load(overrides: &[Override]) -> Result<Settings, SettingsError> {
        Settings::load_with_table(overrides).map(|(settings, _table)| settings)
    }

    /// The same, with the values by section and name.
    pub fn load_with_table(
        overrides: &[Override],
    ) -> Result<(Settings, toml::Table), SettingsError> {
        let mut table = defaults();
        for given in overrides {
            let slot = given
                .key
                .split_once('.')
                .and_then(|(section, name)| table.get_mut(section)?.get_mut(name));
            let Some(slot) = slot else {
                return Err(SettingsError::no_such_key(given.place.clone(), given.key.clone()));
            };
            *slot = match port(given) {
                Some(port) => toml::Value::String(with_port(slot.as_str(), port)),
                None => given.value.clone(),
            };
            // Two ways to say the same: the later one counts.
            let other = match given.key.as_str() {
                "redis.url" => "url_file",
                "redis.url_file" => "url",
                _ => "",
            };
            if let Some(slot) = table.get_mut("redis").and_then(|it| it.get_mut(other)) {
                *slot = toml::Value::String(String::new());
            }
            // Checked one by one, so that the error can name the place at fault.
            if let Err(error) = Settings::deserialize(table.clone()) {
                return Err(SettingsError::BadValue {
                    place: given.place.clone(),
                    key: given.key.clone(),
                    expected: error.message().to_owned(),
                });
            }
        }
        let settings = Settings::deserialize(table.clone());
        Ok((settings.expect("the shipped settings are valid: a test reads them"), table))
    }
}

/// Returns the port, where an address to listen on is given as one alone.
fn port(given: &Override) -> Option<u16> {
    if !given.key.ends_with(".listen") {
        return None;
    }
    match &given.value {
        toml::Value::Integer(port) => u16::try_from(*port).ok(),
        value => value.as_str()?.parse().ok(),
    }
}

/// Puts a port in place of that of the address before, which may come from another layer.
fn with_port(before: Option<&str>, port: u16) -> String {
    let address = match before.map(str::parse) {
        Some(Ok(ListenOn::Tcp(address))) => address.ip(),
        _ => Ipv4Addr::LOCALHOST.into(),
    };
    SocketAddr::new(address, port).to_string()
}

/// Reads the overrides in a settings file.
pub fn from_file(name: &str, text: &str) -> Result<Vec<Override>, SettingsError> {
    let line = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
    let table = DeTable::parse(text).map_err(|error| SettingsError::Syntax {
        place: match error.span() {
            Some(span) => format!("{name}:{}", line(span.start)),
            None => name.to_owned(),
        },
        message: error.message().to_owned(),
    })?;
    let mut given = Vec::new();
    for (section, content) in table.get_ref() {
        let DeValue::Table(entries) = content.get_ref() else {
            let place = format!("{name}:{}", line(section.span().start));
            return Err(SettingsError::no_such_key(place, section.get_ref().to_string()));
        };
        for (key, value) in entries {
            let place = format!("{name}:{}", line(key.span().start));
            let key = format!("{}.{}", section.get_ref(), key.get_ref());
            let value = toml::Value::deserialize(toml::de::ValueDeserializer::from(value.clone()))
                .map_err(|error| SettingsError::BadValue {
                    place: place.clone(),
                    key: key.clone(),
                    expected: error.message().to_owned(),
                })?;
            given.push(Override { key, value, place });
        }
    }
    one_of_two_urls(&mut given)?;
    Ok(given)
}

/// Returns whether a variable looks like a setting and isn't one: the path of the settings file, and those that Kubernetes sets in
/// every container beside a service named afterimage, or afterimage-admin: `AFTERIMAGE_SERVICE_HOST`, `AFTERIMAGE_ADMIN_PORT`,
/// `AFTERIMAGE_PORT_80_TCP_ADDR`.
fn is_no_setting(name: &str, text: &str) -> bool {
    let is_number = |text: &str| text.starts_with(|it: char| it.is_ascii_digit());
    name == "AFTERIMAGE_CONFIG"
        || name.contains("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || (name.ends_with("_PORT") && text.contains("://"))
        || name.split_once("_PORT_").is_some_and(|(_, rest)| is_number(rest))
}

/// The override of the port in a variable or a flag. The rest of the address may come from another layer.
pub fn from_port(text: &str, place: &str) -> Result<Override, SettingsError> {
    let port: u16 = text.parse().map_err(|error| SettingsError::BadValue {
        place: place.to_owned(),
        key: "http.listen".to_owned(),
        expected: format!("`{text}` is not a port ({error}); it must be 0 to 65535"),
    })?;
    let value = toml::Value::Integer(port.into());
    Ok(Override { key: "http.listen".to_owned(), value, place: place.to_owned() })
}

/// Reads the overrides in the environment: `AFTERIMAGE_…`, and with less weight `PORT`, `REDIS_URL` and `REDIS_URL_FILE`.
pub fn from_environment(
    variables: impl Iterator<Item = (String, String)>,
) -> Result<Vec<Override>, SettingsError> {
    let all = described();
    let (mut common, mut own) = (Vec::new(), Vec::new());
    for (name, text) in variables {
        let common_key = match name.as_str() {
            "REDIS_URL" => Some("redis.url"),
            "REDIS_URL_FILE" => Some("redis.url_file"),
            _ => None,
        };
        if let Some(key) = common_key {
            let value = toml::Value::String(text);
            common.push(Override { key: key.to_owned(), value, place: name });
        } else if name == "PORT" {
            common.push(from_port(&text, &name)?);
        } else if name.starts_with("AFTERIMAGE_") && !is_no_setting(&name, &text) {
            let setting = all.iter().find(|setting| setting.variable() == name);
            let setting = setting.ok_or_else(|| SettingsError::no_such_variable(&name))?;
            own.push(setting.overridden(&text, name));
        }
    }
    one_of_two_urls(&mut common)?;
    one_of_two_urls(&mut own)?;
    common.append(&mut own);
    Ok(common)
}

/// Reads the overrides on the command line.
pub fn from_flags(flags: impl Iterator<Item = Override>) -> Result<Vec<Override>, SettingsError> {
    let mut flags = flags.collect();
    one_of_two_urls(&mut flags)?;
    Ok(flags)
}

/// Refuses a layer that gives the address of Redis in two ways. An empty text beside an address gives none: it would erase it.
fn one_of_two_urls(layer: &mut Vec<Override>) -> Result<(), SettingsError> {
    let given = |key: &str| {
        let is_set = |it: &&Override| it.key == key && it.value.as_str() != Some("");
        layer.iter().find(is_set)
    };
    match (given("redis.url"), given("redis.url_file")) {
        (Some(_), Some(file)) => Err(SettingsError::BadValue {
            place: file.place.clone(),
            key: file.key.clone(),
            expected: "`redis.url` is given as well; set one of the two".to_owned(),
        }),
        (None, None) => Ok(()),
        (Some(_), None) | (None, Some(_)) => {
            let is_empty = |it: &Override| it.value.as_str() == Some("");
            layer
                .retain(|it| !(is_empty(it) && matches!(&*it.key, "redis.url" | "redis.url_file")));
            Ok(())
        }
    }
}

fn defaults() -> toml::Table {
    toml::from_str(SHIPPED).expect("the shipped settings are TOML: a test reads them")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn load_file(text: &str) -> Result<Settings, SettingsError> {
        Settings::load(&from_file("my.toml", text)?)
    }

    fn load_flags(flags: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        let all = described();
        let flags = flags.iter().map(|(key, text)| {
            let setting = all.iter().find(|it| it.key == *key).unwrap();
            setting.overridden(text, format!("--{}", setting.flag()))
        });
        Settings::load(&from_flags(flags)?)
    }

    fn load_environment(variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        let variables =
            variables.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        Settings::load(&from_environment(variables)?)
    }

    #[test]
    fn the_shipped_file_gives_every_setting_and_describes_it() {
        let settings = Settings::load(&[]).unwrap();
        assert_eq!(settings.http.listen.to_string(), "127.0.0.1:8000");
        assert_eq!(settings.cache.images.get(), 50);
        assert_eq!(settings.cache.bytes, 50 * 1024 * 1024);
        assert_eq!(settings.records.ttl, Duration::from_hours(2));
        // Read again as a user's file it changes nothing, and nothing in it is unknown.
        let again = load_file(SHIPPED).unwrap();
        assert_eq!(format!("{settings:?}"), format!("{again:?}"));
        let all = described();
        let leaves: usize =
            defaults().values().map(|section| section.as_table().unwrap().len()).sum();
        assert_eq!(all.len(), leaves);
        for setting in all {
            assert!(!setting.help.is_empty(), "{} has no comment", setting.key);
        }
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_name_and_line() {
        let error = load_file("[http]\n\n[cache]\nimages = 5\nimage = 5\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "my.toml:5: there is no setting `cache.image`; did you mean `cache.images`?"
        );
        let error = load_environment(&[("AFTERIMAGE_CACHE_IMAGE", "5")]).unwrap_err();
        assert!(error.to_string().contains("AFTERIMAGE_CACHE_IMAGE"));
        assert!(load_file("images = 5").unwrap_err().to_string().starts_with("my.toml:1:"));
    }

    #[test]
    fn an_empty_address_of_redis_erases_none_beside_it() {
        for (url, file) in [("redis://127.0.0.1/", ""), ("", "/run/redis-url")] {
            let settings = [
                load_file(&format!("[redis]\nurl = \"{url}\"\nurl_file = \"{file}\"\n")),
                load_file(&format!("[redis]\nurl_file = \"{file}\"\nurl = \"{url}\"\n")),
                load_environment(&[("REDIS_URL", url), ("REDIS_URL_FILE", file)]),
                load_environment(&[
                    ("AFTERIMAGE_REDIS_URL", url),
                    ("AFTERIMAGE_REDIS_URL_FILE", file),
                ]),
                load_flags(&[("redis.url", url), ("redis.url_file", file)]),
            ];
            for settings in settings {
                let redis = settings.unwrap().redis;
                assert_eq!(redis.url.get().unwrap_or_default(), url);
                assert_eq!(redis.url_file.to_str(), Some(file));
            }
        }
    }

    #[test]
    fn a_former_name_is_refused_with_the_new_one() {
        for (old, new) in RENAMED {
            assert!(described().iter().any(|setting| setting.key == new), "{new}");
            let (section, name) = old.split_once('.').unwrap();
            let error = load_file(&format!("[{section}]\n{name} = 5\n")).unwrap_err();
            let named = format!("the setting `{old}` is now called `{new}`");
            assert_eq!(error.to_string(), format!("my.toml:2: {named}"));
            let variable = variable(old);
            let error = load_environment(&[(&variable, "5")]).unwrap_err();
            assert_eq!(error.to_string(), format!("{variable}: {named}"));
        }
    }

    #[test]
    fn a_bad_value_is_refused_with_its_key_its_place_and_what_was_expected() {
        for (text, expected) in [
            (
                "[cache]\nimages = 0",
                "my.toml:2: bad value for `cache.images`: invalid value: integer `0`, expected a nonzero usize",
            ),
            ("[cache]\nbytes = \"many\"", "my.toml:2: bad value for `cache.bytes`: "),
            (
                "[redis]\nconnections = 65",
                "my.toml:2: bad value for `redis.connections`: 65 is out of range; it must be 1 to 64",
            ),
            (
                "[http]\nheader_timeout = \"0s\"",
                "my.toml:2: bad value for `http.header_timeout`: `0s` is not a duration from 1ns to 1day",
            ),
            (
                "[http]\nlisten = \"here\"",
                "my.toml:2: bad value for `http.listen`: `here` is not an address to listen on",
            ),
            (
                "[log]\nfilter = \"loud\"",
                "my.toml:2: bad value for `log.filter`: `loud` is not a log filter",
            ),
            ("[cache\n", "my.toml:1: the file must be TOML: "),
        ] {
            let error = load_file(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let error = load_environment(&[("AFTERIMAGE_CACHE_IMAGES", "abc")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "AFTERIMAGE_CACHE_IMAGES: bad value for `cache.images`: invalid type: string \"abc\", expected a nonzero usize"
        );
    }

    #[test]
    fn a_refused_redis_address_never_prints_its_password() {
        let error = load_environment(&[("REDIS_URL", "http://:hunter2@example")]).unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
        let good = load_environment(&[("REDIS_URL", "redis://:hunter2@127.0.0.1/3")]).unwrap();
        assert!(!format!("{good:?}").contains("hunter2"));
    }

    #[test]
    fn own_variables_win_over_the_common_ones() {
        let settings = load_environment(&[
            ("AFTERIMAGE_REDIS_URL", "redis://127.0.0.1:7777"),
            ("REDIS_URL", "redis://127.0.0.1:6666"),
            ("PORT", "9000"),
            ("AFTERIMAGE_CACHE_IMAGES", "7"),
        ])
        .unwrap();
        assert_eq!(settings.redis.url.get(), Some("redis://127.0.0.1:7777"));
        assert_eq!(settings.http.listen.to_string(), "127.0.0.1:9000");
        assert_eq!(settings.cache.images.get(), 7);
        assert!(load_environment(&[("PORT", "web")]).is_err());

        // PORT changes only the port of an address from the file.
        let mut layers = from_file("my.toml", "[http]\nlisten = \"0.0.0.0:1\"").unwrap();
        let port = [("PORT".to_owned(), "9000".to_owned())];
        layers.extend(from_environment(port.into_iter()).unwrap());
        assert_eq!(Settings::load(&layers).unwrap().http.listen.to_string(), "0.0.0.0:9000");
    }

    #[test]
    fn variables_that_kubernetes_sets_beside_a_service_of_this_name_are_ignored() {
        load_environment(&[
            ("AFTERIMAGE_SERVICE_HOST", "10.0.0.1"),
            ("AFTERIMAGE_PORT", "tcp://10.0.0.1:80"),
            ("AFTERIMAGE_PORT_80_TCP", "tcp://10.0.0.1:80"),
            ("AFTERIMAGE_ADMIN_SERVICE_PORT_HTTP", "8001"),
            ("AFTERIMAGE_ADMIN_PORT", "tcp://10.0.0.2:8001"),
            ("AFTERIMAGE_ADMIN_PORT_8001_TCP_ADDR", "10.0.0.2"),
        ])
        .unwrap();
        let variables = described().into_iter().map(|it| it.variable());
        assert!(variables.into_iter().all(|variable| !is_no_setting(&variable, "tcp://10.0.0.1")));
        // One that a person would write is none of Kubernetes'.
        assert!(load_environment(&[("AFTERIMAGE_HTTP_PORT", "9000")]).is_err());
    }
}
