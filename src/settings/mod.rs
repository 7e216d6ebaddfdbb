//! The settings: one tree of small structs, read once, validated at start.
//!
//! `config/afterimage.toml` is compiled in and is the only place where a default, a setting's name or
//! its description is written down. A settings file, the environment and the flags are layers of
//! [`Override`]s over it, all checked in the same way, so each error names the key, where it was given
//! and what was expected there.

use std::fmt;
use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use hyper::Uri;
use hyper::header::HeaderValue;
use serde::{Deserialize, Deserializer, de};
use toml::de::{DeTable, DeValue};
use tracing_subscriber::filter::{LevelFilter, Targets};

/// The shipped settings file: defaults, names and descriptions.
pub const SHIPPED: &str = include_str!("../../config/afterimage.toml");

/// Everything that can be set. Each field is documented in `config/afterimage.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct Settings {
    pub http: HttpSettings,
    pub admin: AdminSettings,
    pub redis: RedisSettings,
    pub embedded: EmbeddedSettings,
    pub records: RecordSettings,
    pub writes: WriteSettings,
    pub events: EventSettings,
    pub offload: OffloadSettings,
    pub cache: CacheSettings,
    pub pictures: PictureSettings,
    pub limits: LimitSettings,
    pub log: LogSettings,
}

/// `[http]`: where and how requests are accepted.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct HttpSettings {
    pub listen: ListenOn,
    pub tls_cert_file: PathBuf,
    pub tls_key_file: PathBuf,
    #[serde(deserialize_with = "duration")]
    pub tls_reload_interval: Duration,
    #[serde(deserialize_with = "duration_or_none")]
    pub max_age: Duration,
    #[serde(deserialize_with = "duration_or_none")]
    pub stale_while_revalidate: Duration,
    #[serde(deserialize_with = "duration_or_none")]
    pub stale_if_error: Duration,
    pub cors_origins: Origins,
    #[serde(deserialize_with = "duration")]
    pub header_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub body_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub send_timeout: Duration,
    #[serde(deserialize_with = "duration_or_none")]
    pub shutdown_delay: Duration,
    #[serde(deserialize_with = "duration")]
    pub shutdown_timeout: Duration,
}

/// `[admin]`: a listener for operators.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct AdminSettings {
    #[serde(deserialize_with = "listen_or_none")]
    pub listen: Option<ListenOn>,
}

/// `[redis]`: how the Redis store is reached.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct RedisSettings {
    pub url: RedisUrl,
    pub tls_ca_file: PathBuf,
    pub tls_cert_file: PathBuf,
    pub tls_key_file: PathBuf,
    #[serde(deserialize_with = "connections")]
    pub connections: NonZeroU8,
    #[serde(deserialize_with = "duration")]
    pub connect_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub response_timeout: Duration,
    pub tracking: bool,
}

/// `[embedded]`: the store on disk that is used without Redis.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct EmbeddedSettings {
    pub dir: PathBuf,
    pub demo: bool,
    #[serde(deserialize_with = "duration")]
    pub sweep_interval: Duration,
}

/// `[records]`: what the store holds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct RecordSettings {
    pub key_prefix: String,
    #[serde(deserialize_with = "size")]
    pub max_value: usize,
    #[serde(deserialize_with = "ttl")]
    pub ttl: Duration,
    #[serde(deserialize_with = "ttl")]
    pub max_ttl: Duration,
}

/// `[writes]`: who may write.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct WriteSettings {
    pub enabled: bool,
    pub tokens: Vec<Token>,
    pub tokens_file: PathBuf,
}

/// `[events]`: how changes are told to browsers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct EventSettings {
    pub ids: NonZeroUsize,
    pub streams: NonZeroUsize,
    #[serde(deserialize_with = "size")]
    pub inline_bytes: usize,
    #[serde(deserialize_with = "duration")]
    pub heartbeat: Duration,
}

/// `[offload]`: an object store that images are moved to.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct OffloadSettings {
    pub url: String,
    pub options: StoreOptions,
    pub public_url: String,
    pub serve: ServeOffloaded,
    #[serde(deserialize_with = "connections")]
    pub concurrency: NonZeroU8,
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub sweep_interval: Duration,
    #[serde(deserialize_with = "duration_or_none")]
    pub grace: Duration,
}

/// How an offloaded image is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServeOffloaded {
    /// Its bytes are fetched, kept in memory and sent as those of any other.
    Stream,
    /// The client is sent to where it is.
    Redirect,
}

/// `[cache]`: what is kept in memory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct CacheSettings {
    pub images: NonZeroUsize,
    #[serde(deserialize_with = "size")]
    pub bytes: usize,
    pub known: NonZeroUsize,
    #[serde(deserialize_with = "duration")]
    pub stale_if_error: Duration,
}

/// `[pictures]`: which variants may be asked for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct PictureSettings {
    #[serde(deserialize_with = "lengths")]
    pub widths: Vec<u32>,
    #[serde(deserialize_with = "lengths")]
    pub heights: Vec<u32>,
    #[serde(deserialize_with = "dprs")]
    pub dprs: Vec<u32>,
    #[serde(deserialize_with = "qualities")]
    pub qualities: Vec<u32>,
    #[serde(deserialize_with = "quality")]
    pub default_quality: u8,
    pub avif: bool,
    #[serde(deserialize_with = "pixels")]
    pub max_pixels: u64,
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
}

/// `[limits]`: what may be under way at the same time.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct LimitSettings {
    #[serde(deserialize_with = "size")]
    pub fetch_bytes: usize,
    #[serde(deserialize_with = "size")]
    pub write_bytes: usize,
    pub waiters: NonZeroUsize,
    pub renders: NonZeroUsize,
    pub connections: NonZeroUsize,
    pub streams: NonZeroU32,
    pub requests: NonZeroUsize,
    #[serde(deserialize_with = "header_size")]
    pub header_bytes: usize,
}

/// `[log]`: what is logged.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct LogSettings {
    #[serde(deserialize_with = "log_filter")]
    pub filter: String,
    pub format: LogFormat,
    pub access: bool,
}

/// How a line of the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where a listener listens: `127.0.0.1:8000`, or `unix:/run/afterimage.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenOn {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl FromStr for ListenOn {
    type Err = String;

    fn from_str(text: &str) -> Result<ListenOn, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(ListenOn::Unix(path.into())),
            _ => text.parse().map(ListenOn::Tcp).map_err(|error| {
                format!(
                    "`{text}` is no address to listen on ({error}), expected such as \"127.0.0.1:8000\", \"[::]:8000\" or \"unix:/run/afterimage.sock\""
                )
            }),
        }
    }
}

impl fmt::Display for ListenOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenOn::Tcp(address) => address.fmt(f),
            ListenOn::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for ListenOn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Whose scripts may read images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origins {
    /// Only those of the server's own origin.
    None,
    /// All.
    Any,
    /// Those of these origins, as `Origin` names them.
    Listed(Vec<HeaderValue>),
}

impl<'de> Deserialize<'de> for Origins {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let listed = Vec::<String>::deserialize(deserializer)?;
        if listed.is_empty() {
            return Ok(Origins::None);
        }
        if listed == ["*"] {
            return Ok(Origins::Any);
        }
        let origin = |text: &String| match text.parse::<Uri>() {
            Ok(uri)
                if uri.scheme().is_some()
                    && uri.authority().is_some()
                    && !text.ends_with('/')
                    && uri.path_and_query().is_none_or(|it| it == "/") =>
            {
                HeaderValue::from_str(text).ok()
            }
            _ => None,
        };
        let origins = listed.iter().map(|text| {
            origin(text).ok_or_else(|| {
                de::Error::custom(format!(
                    "`{text}` is no origin, expected such as \"https://app.example\", or \"*\" alone"
                ))
            })
        });
        origins.collect::<Result<_, _>>().map(Origins::Listed)
    }
}

/// The address of a Redis server, or none. Never prints the password.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RedisUrl(Option<String>);

impl RedisUrl {
    /// The address as it was given, password included; `None` where none was.
    #[must_use]
    pub fn get(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Some(_) => "RedisUrl(set)",
            None => "RedisUrl(none)",
        })
    }
}

impl<'de> Deserialize<'de> for RedisUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(RedisUrl(None));
        }
        // The error must not repeat the text, which may hold a password.
        redis::Client::open(text.as_str()).map_err(|error| {
            de::Error::custom(format!(
                "not the address of a Redis server ({error}), expected such as redis://127.0.0.1:6379/0"
            ))
        })?;
        Ok(RedisUrl(Some(text)))
    }
}

/// A bearer token. It never prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Takes a text that can stand in `Authorization` (`b64token`, RFC 6750 §2.1) and is long enough that nobody guesses
    /// it. The error doesn't repeat it.
    pub fn parse(text: &str) -> Result<Token, String> {
        const LENGTHS: std::ops::RangeInclusive<usize> = 16..=512;
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte);
        let stem = text.trim_end_matches('=');
        if LENGTHS.contains(&text.len()) && !stem.is_empty() && stem.bytes().all(known) {
            return Ok(Token(text.to_owned()));
        }
        Err("a token has 16 to 512 of A-Z a-z 0-9 - . _ ~ + / and maybe = at its end".to_owned())
    }

    /// The token itself, to be sent or compared.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(set)")
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Token::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// What an object store is opened with, by the names that the `object_store` crate gives them. The values never print:
/// some are secrets.
#[derive(Clone, Default)]
pub struct StoreOptions(Vec<(String, String)>);

impl StoreOptions {
    /// Name and value of each.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _value)| name)).finish()
    }
}

impl<'de> Deserialize<'de> for StoreOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let options = Vec::<String>::deserialize(deserializer)?;
        let options = options.iter().map(|option| {
            let (name, value) = option.split_once('=').ok_or_else(|| {
                de::Error::custom("an option is a name and a value, such as \"region=eu-north-1\"")
            })?;
            Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
        });
        options.collect::<Result<_, _>>().map(StoreOptions)
    }
}

/// One setting given somewhere else than in the shipped file.
#[derive(Debug, Clone)]
pub struct Override {
    /// Its dotted name, such as `cache.images`.
    pub key: String,
    /// Its value, as text where it came from a variable or a flag.
    pub value: toml::Value,
    /// Where it was given, as a user would look for it: `afterimage.toml:12`, `AFTERIMAGE_CACHE_IMAGES`.
    pub place: String,
}

/// Why the settings were refused.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The settings file isn't TOML.
    #[error("{place}: not TOML: {message}")]
    Syntax {
        /// File and line.
        place: String,
        /// What the parser expected.
        message: String,
    },
    /// A key that no setting has.
    #[error("{place}: there is no setting `{key}`; the settings are in config/afterimage.toml")]
    UnknownKey {
        /// Where it was given.
        place: String,
        /// The name that was given.
        key: String,
    },
    /// A value that the setting can't take.
    #[error("{place}: bad value for `{key}`: {expected}")]
    BadValue {
        /// Where it was given.
        place: String,
        /// The setting's name.
        key: String,
        /// What was found and what was expected.
        expected: String,
    },
}

/// A setting as the shipped file describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// The dotted name.
    pub key: String,
    /// The comment above it.
    pub help: String,
    /// The default.
    pub default: toml::Value,
}

impl Described {
    /// The environment variable that overrides the setting.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("AFTERIMAGE_{}", self.key.replace('.', "_").to_uppercase())
    }

    /// The flag that overrides the setting, without its dashes.
    #[must_use]
    pub fn flag(&self) -> String {
        self.key.replace(['.', '_'], "-")
    }

    /// An override of this setting by text from a variable or a flag.
    ///
    /// Text for a setting that isn't a string is read as TOML; what isn't TOML stays text, for the
    /// setting's own type to refuse with its own message.
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

/// Every setting, in the order of the shipped file.
#[must_use]
pub fn described() -> Vec<Described> {
    let defaults = defaults();
    let (mut section, mut help, mut all) = (String::new(), String::new(), Vec::new());
    for line in SHIPPED.lines() {
        if let Some(comment) = line.strip_prefix('#') {
            help.push_str(comment);
        } else if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            name.clone_into(&mut section);
        } else if let Some((name, _)) = line.split_once(" = ") {
            if let Some(default) = defaults.get(&section).and_then(|table| table.get(name)) {
                all.push(Described {
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

impl Settings {
    /// The defaults, with each override applied in turn: later ones win.
    pub fn load(overrides: &[Override]) -> Result<Settings, SettingsError> {
        let mut table = defaults();
        for given in overrides {
            let slot = given
                .key
                .split_once('.')
                .and_then(|(section, name)| table.get_mut(section)?.get_mut(name));
            let Some(slot) = slot else {
                return Err(SettingsError::UnknownKey {
                    place: given.place.clone(),
                    key: given.key.clone(),
                });
            };
            *slot = match (&given.value, slot.as_str().map(str::parse::<SocketAddr>)) {
                (toml::Value::Integer(port), Some(Ok(mut listen))) if given.place == "PORT" => {
                    listen.set_port(u16::try_from(*port).unwrap_or_default());
                    toml::Value::String(listen.to_string())
                }
                (value, _) => value.clone(),
            };
            // Checked one by one, so that the error can name the place that is to blame.
            if let Err(error) = Settings::deserialize(table.clone()) {
                return Err(SettingsError::BadValue {
                    place: given.place.clone(),
                    key: given.key.clone(),
                    expected: error.message().to_owned(),
                });
            }
        }
        Ok(Settings::deserialize(table).expect("the shipped settings are valid: a test reads them"))
    }
}

/// The settings that a settings file gives.
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
            return Err(SettingsError::UnknownKey {
                place: format!("{name}:{}", line(section.span().start)),
                key: section.get_ref().clone().into_owned(),
            });
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
    Ok(given)
}

/// What begins like a variable of a setting and is none: the settings file's own, and what Kubernetes sets
/// in every container beside a service named afterimage.
const NOT_SETTINGS: [&str; 3] = ["AFTERIMAGE_CONFIG", "AFTERIMAGE_SERVICE_", "AFTERIMAGE_PORT"];

/// The settings that environment variables give: `AFTERIMAGE_…`, and `PORT` and `REDIS_URL` beneath them.
pub fn from_environment(
    variables: impl Iterator<Item = (String, String)>,
) -> Result<Vec<Override>, SettingsError> {
    let all = described();
    let (mut common, mut own) = (Vec::new(), Vec::new());
    for (name, text) in variables {
        if name == "REDIS_URL" {
            common.push(Override {
                key: "redis.url".to_owned(),
                value: toml::Value::String(text),
                place: name,
            });
        } else if name == "PORT" {
            let port: u16 = text.parse().map_err(|error| SettingsError::BadValue {
                place: name.clone(),
                key: "http.listen".to_owned(),
                expected: format!("`{text}` is no port ({error}), expected 0 to 65535"),
            })?;
            // The port alone, for the address that the file gives.
            common.push(Override {
                key: "http.listen".to_owned(),
                value: toml::Value::Integer(port.into()),
                place: name,
            });
        } else if name.starts_with("AFTERIMAGE_")
            && !NOT_SETTINGS.iter().any(|it| name.starts_with(it))
        {
            match all.iter().find(|setting| setting.variable() == name) {
                Some(setting) => own.push(setting.overridden(&text, name)),
                None => {
                    return Err(SettingsError::UnknownKey {
                        place: "environment".to_owned(),
                        key: name,
                    });
                }
            }
        }
    }
    common.append(&mut own);
    Ok(common)
}

fn defaults() -> toml::Table {
    toml::from_str(SHIPPED).expect("the shipped settings are TOML: a test reads them")
}

/// The longest of the durations that aren't a time to live: sockets and timers take no more.
const LONGEST: Duration = Duration::from_hours(24);

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    match humantime::parse_duration(&text) {
        Ok(duration) if !duration.is_zero() && duration <= LONGEST => Ok(duration),
        _ => Err(de::Error::custom(format!(
            "`{text}` is no duration from 1ns to 1day, expected such as \"500ms\", \"10s\" or \"2h\""
        ))),
    }
}

/// A duration, or `0s` for what isn't wanted.
fn duration_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    const LONGEST: Duration = Duration::from_hours(365 * 24);
    let text = String::deserialize(deserializer)?;
    match humantime::parse_duration(&text) {
        Ok(duration) if duration <= LONGEST => Ok(duration),
        _ => Err(de::Error::custom(format!(
            "`{text}` is no duration up to 365days, expected such as \"1h\", or \"0s\" for none"
        ))),
    }
}

fn listen_or_none<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<ListenOn>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(de::Error::custom)
}

/// A time to live that every store can keep: 1 ms to ten years.
pub fn time_to_live(text: &str) -> Result<Duration, String> {
    const RANGE: std::ops::RangeInclusive<Duration> =
        Duration::from_millis(1)..=Duration::from_hours(3650 * 24);
    match humantime::parse_duration(text) {
        Ok(duration) if RANGE.contains(&duration) => Ok(duration),
        _ => Err("no duration from 1ms to 3650days, expected such as 90s or 2h".to_owned()),
    }
}

fn ttl<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    time_to_live(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let size = ByteSize::deserialize(deserializer)?.as_u64();
    match usize::try_from(size) {
        Ok(size) if size >= 1024 => Ok(size),
        _ => Err(de::Error::custom(format!(
            "{size} bytes are out of range, expected at least 1KiB, such as \"50MiB\""
        ))),
    }
}

/// Numbers from 1 to a most, in order and once each.
fn numbers<'de, D: Deserializer<'de>>(deserializer: D, most: u32) -> Result<Vec<u32>, D::Error> {
    let mut numbers = Vec::<u32>::deserialize(deserializer)?;
    if let Some(number) = numbers.iter().find(|number| !(1..=most).contains(*number)) {
        return Err(de::Error::custom(format!("{number} is out of range, expected 1 to {most}")));
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// The longest side that a picture is made with, before the density of a screen is counted.
pub const MAX_LENGTH: u32 = 4096;

fn lengths<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    numbers(deserializer, MAX_LENGTH)
}

fn dprs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    numbers(deserializer, 4)
}

fn qualities<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    numbers(deserializer, 100)
}

fn quality<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    match u8::deserialize(deserializer)? {
        quality @ 1..=100 => Ok(quality),
        quality => Err(de::Error::custom(format!("{quality} is out of range, expected 1 to 100"))),
    }
}

/// A decoder may take 16 bytes a pixel.
fn pixels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    match u64::deserialize(deserializer)? {
        pixels @ 1..=1_000_000_000 => Ok(pixels),
        pixels => {
            Err(de::Error::custom(format!("{pixels} is out of range, expected 1 to 1000000000")))
        }
    }
}

/// The smallest is what the HTTP library needs, the largest what it takes.
fn header_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    match size(deserializer)? {
        size @ 8192..=1_048_576 => Ok(size),
        size => {
            Err(de::Error::custom(format!("{size} bytes are out of range, expected 8KiB to 1MiB")))
        }
    }
}

fn connections<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NonZeroU8, D::Error> {
    let count = i64::deserialize(deserializer)?;
    u8::try_from(count)
        .ok()
        .filter(|count| *count <= 64)
        .and_then(NonZeroU8::new)
        .ok_or_else(|| de::Error::custom(format!("{count} is out of range, expected 1 to 64")))
}

fn log_filter<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    // A word alone that is no level would be taken for a module and silence everything else.
    let levels = text.split(',').filter(|directive| !directive.contains('=')).map(str::trim);
    let known = levels.clone().all(|level| level.parse::<LevelFilter>().is_ok());
    if known && text.parse::<Targets>().is_ok() {
        return Ok(text);
    }
    Err(de::Error::custom(format!(
        "`{text}` is no log filter, expected such as \"info\" or \"info,afterimage=debug\""
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_file(text: &str) -> Result<Settings, SettingsError> {
        Settings::load(&from_file("my.toml", text)?)
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
        // Given again as a user's file, it changes nothing and nothing in it is unknown.
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
            "my.toml:5: there is no setting `cache.image`; the settings are in config/afterimage.toml"
        );
        let error = load_environment(&[("AFTERIMAGE_CACHE_IMAGE", "5")]).unwrap_err();
        assert!(error.to_string().contains("AFTERIMAGE_CACHE_IMAGE"));
        assert!(load_file("images = 5").unwrap_err().to_string().starts_with("my.toml:1:"));
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
                "my.toml:2: bad value for `redis.connections`: 65 is out of range, expected 1 to 64",
            ),
            (
                "[http]\nheader_timeout = \"0s\"",
                "my.toml:2: bad value for `http.header_timeout`: `0s` is no duration from 1ns to 1day",
            ),
            (
                "[http]\nlisten = \"here\"",
                "my.toml:2: bad value for `http.listen`: `here` is no address to listen on",
            ),
            (
                "[log]\nfilter = \"loud\"",
                "my.toml:2: bad value for `log.filter`: `loud` is no log filter",
            ),
            ("[cache\n", "my.toml:1: not TOML: "),
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

        // PORT changes the port of the address that a file gives, and nothing else of it.
        let mut layers = from_file("my.toml", "[http]\nlisten = \"0.0.0.0:1\"").unwrap();
        let port = [("PORT".to_owned(), "9000".to_owned())];
        layers.extend(from_environment(port.into_iter()).unwrap());
        assert_eq!(Settings::load(&layers).unwrap().http.listen.to_string(), "0.0.0.0:9000");
    }

    #[test]
    fn what_kubernetes_sets_beside_a_service_of_this_name_is_no_setting() {
        load_environment(&[
            ("AFTERIMAGE_SERVICE_HOST", "10.0.0.1"),
            ("AFTERIMAGE_PORT", "tcp://10.0.0.1:80"),
            ("AFTERIMAGE_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ])
        .unwrap();
    }
}
