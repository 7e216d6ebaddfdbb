//! The settings: one tree of small structs, read once and validated at start.

mod layers;
mod values;

use std::num::{NonZeroU8, NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;

pub use self::layers::{
    Override, SHIPPED, SettingInfo, SettingsError, described, from_environment, from_file,
    from_flags, from_port, renamed,
};
pub use self::values::{
    HostNames, ListenOn, MAX_LENGTH, Origins, RedisUrl, StoreOptions, Token, TrustedProxies,
    time_to_live,
};
use self::values::{
    connections, dprs, duration, duration_or_none, header_size, lengths, listen_or_none,
    log_filter, pixels, qualities, quality, size, size_or_none, ttl,
};

/// All settings. `config/afterimage.toml` documents each field.
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
    pub gallery: GallerySettings,
    pub audit: AuditSettings,
    pub offload: OffloadSettings,
    pub cache: CacheSettings,
    pub pictures: PictureSettings,
    pub limits: LimitSettings,
    pub log: LogSettings,
}

impl Settings {
    /// Reads the address of Redis from the file that the settings name, if they name one.
    pub fn read_url_file(&mut self) -> anyhow::Result<()> {
        let RedisSettings { url, url_file, .. } = &mut self.redis;
        if url_file.as_os_str().is_empty() {
            return Ok(());
        }
        let place = || format!("{} ([redis] url_file)", url_file.display());
        let text = std::fs::read_to_string(&*url_file).with_context(place)?;
        let read = RedisUrl::parse(text.trim().to_owned()).map_err(anyhow::Error::msg);
        *url = read.with_context(place)?;
        anyhow::ensure!(url.get().is_some(), "{} must have an address", place());
        Ok(())
    }
}

/// `[http]`: the public listener, its caching headers and time limits.
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
    pub cap_max_age_at_expiry: bool,
    pub cors_origins: Origins,
    pub hosts: HostNames,
    pub trusted_proxies: TrustedProxies,
    pub proxy_protocol: bool,
    #[serde(deserialize_with = "duration")]
    pub header_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub body_timeout: Duration,
    #[serde(deserialize_with = "duration")]
    pub send_timeout: Duration,
    #[serde(deserialize_with = "size_or_none")]
    pub min_send_rate: usize,
    #[serde(deserialize_with = "duration_or_none")]
    pub shutdown_delay: Duration,
    #[serde(deserialize_with = "duration")]
    pub shutdown_timeout: Duration,
}

/// `[admin]`: the listener for operators.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct AdminSettings {
    #[serde(deserialize_with = "listen_or_none")]
    pub listen: Option<ListenOn>,
}

/// `[redis]`: the Redis server and the connections to it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct RedisSettings {
    pub url: RedisUrl,
    pub url_file: PathBuf,
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
    pub canary: bool,
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

/// `[records]`: keys, sizes and lifetimes of records.
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

/// `[writes]`: the right to write.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct WriteSettings {
    pub enabled: bool,
    pub tokens: Vec<Token>,
    pub tokens_file: PathBuf,
    pub local: bool,
    pub verify: bool,
}

/// `[events]`: the event streams that tell browsers of changes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct EventSettings {
    pub prefix: PrefixAccess,
    pub ids: NonZeroUsize,
    pub connections: NonZeroUsize,
    #[serde(deserialize_with = "size")]
    pub inline_bytes: usize,
    #[serde(deserialize_with = "duration")]
    pub heartbeat: Duration,
}

/// The right to follow a prefix, which lists the ids that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrefixAccess {
    /// For those with a token.
    Token,
    /// For everybody. The empty prefix, which is the whole database, needs a token all the same.
    Open,
    /// For nobody.
    Off,
}

/// `[gallery]`: the page for people who look after the images.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct GallerySettings {
    pub enabled: bool,
}

/// `[audit]`: comparisons of the index with the store.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct AuditSettings {
    #[serde(deserialize_with = "duration_or_none")]
    pub interval: Duration,
    pub entries: NonZeroUsize,
}

/// `[offload]`: the object store that images are moved to.
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

/// Answer to a request for an offloaded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServeOffloaded {
    /// Its bytes are fetched, cached and sent like those of any other image.
    Stream,
    /// The client is redirected to its public URL.
    Redirect,
}

/// `[cache]`: bounds of what is kept in memory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct CacheSettings {
    pub images: NonZeroUsize,
    #[serde(deserialize_with = "size")]
    pub bytes: usize,
    #[serde(deserialize_with = "size")]
    pub derived_bytes: usize,
    pub index_entries: NonZeroUsize,
    pub absent_entries: NonZeroUsize,
    #[serde(deserialize_with = "duration")]
    pub serve_stale_for: Duration,
}

/// `[pictures]`: the variants that clients may request.
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
    pub max_animation_frames: u32,
    #[serde(deserialize_with = "pixels")]
    pub max_animation_pixels: u64,
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
    /// Afterimage as a program, for decoder processes. No setting: tests, whose program is another one, set it.
    #[serde(skip, default = "this_program")]
    pub program: PathBuf,
}

/// Returns the running program. The link leads to it even after an upgrade has replaced its file.
fn this_program() -> PathBuf {
    let link = Path::new("/proc/self/exe");
    if link.exists() { link.to_owned() } else { std::env::current_exe().unwrap_or_default() }
}

/// `[limits]`: bounds of what may be in progress at the same time.
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
    pub h2_streams: NonZeroU32,
    pub requests: NonZeroUsize,
    pub answers: NonZeroUsize,
    #[serde(deserialize_with = "header_size")]
    pub header_bytes: usize,
}

/// `[log]`: level, format and access log.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/afterimage.toml documents every field")]
pub struct LogSettings {
    #[serde(deserialize_with = "log_filter")]
    pub filter: String,
    pub format: LogFormat,
    pub access: bool,
}

/// Format of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Plain text, for people.
    Text,
    /// One JSON object per line, for programs.
    Json,
    /// The combined format of Apache and nginx for requests, and text for the rest.
    Combined,
}
