//! Values of settings, parsed into types that can't be wrong.

use std::fmt;
use std::net::{AddrParseError, IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU8;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use hyper::Uri;
use hyper::header::HeaderValue;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};
use tracing_subscriber::filter::{LevelFilter, Targets};

/// Address of a listener: `127.0.0.1:8000` or `unix:/run/afterimage.sock`. `localhost:8000` is the first, and `:8000` is that port
/// of every IPv4 address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenOn {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl FromStr for ListenOn {
    type Err = String;

    fn from_str(text: &str) -> Result<ListenOn, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(ListenOn::Unix(path.into())),
            _ => socket_address(text).map(ListenOn::Tcp).map_err(|error| {
                format!(
                    "`{text}` is not an address to listen on ({error}); write it as \"127.0.0.1:8000\", \":8000\" for every address, or \"unix:/run/afterimage.sock\""
                )
            }),
        }
    }
}

/// Parses an address and port. No name but `localhost` is looked up: settings mean the same everywhere.
fn socket_address(text: &str) -> Result<SocketAddr, AddrParseError> {
    let port_of = |host: &str| text.strip_prefix(host)?.strip_prefix(':')?.parse().ok();
    if let Some(port) = port_of("") {
        return Ok((Ipv4Addr::UNSPECIFIED, port).into());
    }
    if let Some(port) = port_of("localhost") {
        return Ok((Ipv4Addr::LOCALHOST, port).into());
    }
    text.parse()
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

/// Origins whose scripts may read images (CORS).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origins {
    /// Only the server's own.
    None,
    /// All origins.
    Any,
    /// These origins, as the `Origin` header names them.
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
                    "`{text}` is not an origin; write it as \"https://app.example\", or \"*\" alone for all"
                ))
            })
        });
        origins.collect::<Result<_, _>>().map(Origins::Listed)
    }
}

/// Names of hosts, in lower case and without a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostNames(Vec<String>);

impl HostNames {
    /// True without any name.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True for one of the names, in whatever case.
    #[must_use]
    pub fn contain(&self, name: &str) -> bool {
        self.0.iter().any(|it| it.eq_ignore_ascii_case(name))
    }
}

impl<'de> Deserialize<'de> for HostNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let names = Vec::<String>::deserialize(deserializer)?.into_iter().map(|name| {
            if name.is_empty() || name.ends_with('.') || !name.bytes().all(known) {
                return Err(de::Error::custom(format!(
                    "`{name}` is not the name of a host; write it as \"images.example\", without a port"
                )));
            }
            Ok(name.to_ascii_lowercase())
        });
        names.collect::<Result<_, _>>().map(HostNames)
    }
}

/// Proxies whose word about their clients counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedProxies {
    networks: Vec<IpNet>,
    unix: bool,
}

impl TrustedProxies {
    /// True without any proxy.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.networks.is_empty() && !self.unix
    }

    /// True for the address of a proxy, or, without an address, where every client of a Unix socket is one.
    #[must_use]
    pub fn contain(&self, address: Option<IpAddr>) -> bool {
        match address {
            Some(address) => {
                let address = address.to_canonical();
                self.networks.iter().any(|network| network.contains(&address))
            }
            None => self.unix,
        }
    }
}

impl<'de> Deserialize<'de> for TrustedProxies {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut proxies = TrustedProxies { networks: Vec::new(), unix: false };
        for text in Vec::<String>::deserialize(deserializer)? {
            if text == "unix" {
                proxies.unix = true;
                continue;
            }
            let address = text.parse().map(|it: IpAddr| IpNet::from(it.to_canonical()));
            let network = address.or_else(|_no_address| text.parse()).map_err(|_no_network| {
                de::Error::custom(format!(
                    "`{text}` is not an address; write it as \"127.0.0.1\", \"10.0.0.0/8\", \"fd00::/8\" or \"unix\""
                ))
            })?;
            proxies.networks.push(network);
        }
        Ok(proxies)
    }
}

/// Address of a Redis server, or none. It never prints, since it may hold a password.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RedisUrl(Option<String>);

impl RedisUrl {
    /// The address as given, password included, or `None`.
    #[must_use]
    pub fn get(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// The address without user and password, or `None`. Addresses of several hosts are hidden but for their scheme.
    #[must_use]
    pub fn public(&self) -> Option<String> {
        let text = self.0.as_deref()?;
        let Ok(mut url) = url::Url::parse(text) else {
            return text.split_once("://").map(|(scheme, _)| format!("{scheme}://…"));
        };
        // Only of addresses that have none anyway.
        let _ = (url.set_username(""), url.set_password(None));
        // Redis' own scheme for sockets takes a password as a parameter.
        url.set_query(None);
        Some(url.to_string())
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

impl RedisUrl {
    /// Parses an address; an empty text is none. The error doesn't repeat the text, which may have a password.
    pub(super) fn parse(text: String) -> Result<RedisUrl, String> {
        if text.is_empty() {
            return Ok(RedisUrl(None));
        }
        match redis::Client::open(text.as_str()) {
            Ok(_) => Ok(RedisUrl(Some(text))),
            Err(error) => Err(format!(
                "not the address of a Redis server ({error}); write it as redis://127.0.0.1:6379/0"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for RedisUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        RedisUrl::parse(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// Bearer token. It never prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Accepts a text that fits in `Authorization` (`b64token`, RFC 6750 §2.1) and is too long to be guessed. The error
    /// doesn't repeat it.
    pub fn parse(text: &str) -> Result<Token, String> {
        const LENGTHS: std::ops::RangeInclusive<usize> = 16..=512;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte);
        let stem = text.trim_end_matches('=');
        if LENGTHS.contains(&text.len()) && !stem.is_empty() && stem.bytes().all(allowed) {
            return Ok(Token(text.to_owned()));
        }
        Err("a token must have 16 to 512 characters of A-Z a-z 0-9 - . _ ~ + /, with = only at its end".to_owned())
    }

    /// The token in the clear, for sending and comparing.
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

/// Options of an object store, named as the `object_store` crate names them. The values never print: some are secrets.
#[derive(Clone, Default)]
pub struct StoreOptions(Vec<(String, String)>);

impl StoreOptions {
    /// The name and value of each option.
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
                de::Error::custom(
                    "an option must be a name and a value, such as \"region=eu-north-1\"",
                )
            })?;
            Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
        });
        options.collect::<Result<_, _>>().map(StoreOptions)
    }
}

/// Longest timeout or interval: sockets and timers take no more.
const LONGEST: Duration = Duration::from_hours(24);

/// Text of a duration, or a number of seconds.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a duration; write it as \"500ms\", \"10s\" or \"2h\"")]
enum DurationText {
    Seconds(u64),
    Text(String),
}

impl DurationText {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
        Ok(match DurationText::deserialize(deserializer)? {
            DurationText::Seconds(seconds) => seconds.to_string(),
            DurationText::Text(text) => text,
        })
    }
}

/// Parses `500ms`, `10s` and `2h`; a bare number is seconds.
fn parse_duration(text: &str) -> Option<Duration> {
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_no_number) => humantime::parse_duration(text).ok(),
    }
}

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = DurationText::read(deserializer)?;
    match parse_duration(&text) {
        Some(duration) if !duration.is_zero() && duration <= LONGEST => Ok(duration),
        _ => Err(de::Error::custom(format!(
            "`{text}` is not a duration from 1ns to 1day; write it as \"500ms\", \"10s\" or \"2h\""
        ))),
    }
}

/// Reads a duration, or `0s` for none.
pub(super) fn duration_or_none<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Duration, D::Error> {
    const LONGEST: Duration = Duration::from_hours(365 * 24);
    let text = DurationText::read(deserializer)?;
    match parse_duration(&text) {
        Some(duration) if duration <= LONGEST => Ok(duration),
        _ => Err(de::Error::custom(format!(
            "`{text}` is not a duration up to 365days; write it as \"1h\", or \"0s\" for none"
        ))),
    }
}

pub(super) fn listen_or_none<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<ListenOn>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(de::Error::custom)
}

/// Parses a time to live that every store can keep: 1 ms to ten years.
pub fn time_to_live(text: &str) -> Result<Duration, String> {
    const RANGE: std::ops::RangeInclusive<Duration> =
        Duration::from_millis(1)..=Duration::from_hours(3650 * 24);
    match parse_duration(text) {
        Some(duration) if RANGE.contains(&duration) => Ok(duration),
        _ => Err("not a duration from 1ms to 3650days; write it as 90s or 2h".to_owned()),
    }
}

pub(super) fn ttl<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    time_to_live(&DurationText::read(deserializer)?).map_err(de::Error::custom)
}

/// Text of a size, or a number of bytes.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a size; write it as \"64KiB\" or \"50MiB\"")]
enum SizeText {
    Bytes(u64),
    Text(String),
}

impl SizeText {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        match SizeText::deserialize(deserializer)? {
            SizeText::Bytes(bytes) => Ok(bytes),
            SizeText::Text(text) => {
                text.parse().map(|size: ByteSize| size.as_u64()).map_err(|_why| {
                    de::Error::custom(format!(
                        "`{text}` is not a size; write it as \"64KiB\" or \"50MiB\""
                    ))
                })
            }
        }
    }
}

pub(super) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let size = SizeText::read(deserializer)?;
    match usize::try_from(size) {
        Ok(size) if size >= 1024 => Ok(size),
        _ => Err(de::Error::custom(format!(
            "{size} bytes is too small; it must be at least 1KiB, such as \"50MiB\""
        ))),
    }
}

/// Reads a size that may be 0.
pub(super) fn size_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let size = SizeText::read(deserializer)?;
    usize::try_from(size).map_err(|_too_large| {
        de::Error::custom(format!("{size} bytes is too much for this machine"))
    })
}

/// Reads numbers from 1 to `most`; sorts them and removes duplicates.
fn numbers<'de, D: Deserializer<'de>>(deserializer: D, most: u32) -> Result<Vec<u32>, D::Error> {
    let mut numbers = Vec::<u32>::deserialize(deserializer)?;
    if let Some(number) = numbers.iter().find(|number| !(1..=most).contains(*number)) {
        return Err(de::Error::custom(format!("{number} is out of range; it must be 1 to {most}")));
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// Longest side of a variant in CSS pixels, before it is multiplied by the screen's density.
pub const MAX_LENGTH: u32 = 4096;

pub(super) fn lengths<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    numbers(deserializer, MAX_LENGTH)
}

pub(super) fn dprs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    numbers(deserializer, 4)
}

pub(super) fn qualities<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    numbers(deserializer, 100)
}

pub(super) fn quality<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    match u8::deserialize(deserializer)? {
        quality @ 1..=100 => Ok(quality),
        quality => {
            Err(de::Error::custom(format!("{quality} is out of range; it must be 1 to 100")))
        }
    }
}

/// Bounded because a decoder may take 16 bytes per pixel.
pub(super) fn pixels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    match u64::deserialize(deserializer)? {
        pixels @ 1..=1_000_000_000 => Ok(pixels),
        pixels => {
            Err(de::Error::custom(format!("{pixels} is out of range; it must be 1 to 1000000000")))
        }
    }
}

/// The bounds are those of the HTTP library.
pub(super) fn header_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    match size(deserializer)? {
        size @ 8192..=1_048_576 => Ok(size),
        size => {
            Err(de::Error::custom(format!("{size} bytes is out of range; it must be 8KiB to 1MiB")))
        }
    }
}

pub(super) fn connections<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<NonZeroU8, D::Error> {
    let count = i64::deserialize(deserializer)?;
    u8::try_from(count)
        .ok()
        .filter(|count| *count <= 64)
        .and_then(NonZeroU8::new)
        .ok_or_else(|| de::Error::custom(format!("{count} is out of range; it must be 1 to 64")))
}

pub(super) fn log_filter<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    // A single word that isn't a level would be taken for a module, and would silence everything else.
    let levels = text.split(',').filter(|directive| !directive.contains('=')).map(str::trim);
    let all_known = levels.clone().all(|level| level.parse::<LevelFilter>().is_ok());
    if all_known && text.parse::<Targets>().is_ok() {
        return Ok(text);
    }
    Err(de::Error::custom(format!(
        "`{text}` is not a log filter; write it as \"info\" or \"info,afterimage=debug\""
    )))
}
