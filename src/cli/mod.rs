//! The command line: what is asked of the program, and the settings it is to run with.

pub mod client;
mod demo;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use bytes::Bytes;
use clap::{Arg, ArgMatches, value_parser};
use hyper::Method;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::app::App;
use crate::http::auth;
use crate::image::ImageId;
use crate::image::record;
use crate::log;
use crate::picture::sniff;
use crate::server::{self, Listeners};
use crate::settings::{self, ListenOn, Override, Settings, SettingsError};
use crate::store::embedded::InUse;
use crate::store::{Condition, Expiry, Store};

/// What the program was asked to do.
#[derive(Debug)]
pub struct Command {
    settings: Settings,
    task: Action,
}

#[derive(Debug)]
enum Action {
    Serve,
    Put { id: ImageId, file: PathBuf, ttl: Option<Duration> },
    Health,
}

/// Why nothing is run: help was asked for, or the call is wrong.
#[derive(Debug)]
pub enum Exit {
    /// The words of the call, or a request for help.
    Usage(clap::Error),
    /// The settings.
    Settings(anyhow::Error),
}

impl Exit {
    /// Tells the user, and gives the code to exit with.
    #[must_use]
    pub fn print(&self) -> ExitCode {
        match self {
            Exit::Usage(error) => {
                let _ = error.print();
                ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
            }
            Exit::Settings(error) => {
                eprintln!("afterimage: {error:#}");
                ExitCode::from(2)
            }
        }
    }
}

/// Reads the arguments, the settings file that they or `AFTERIMAGE_CONFIG` name, and the environment.
pub fn parse(
    arguments: impl Iterator<Item = OsString>,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Command, Exit> {
    let matches = grammar().try_get_matches_from(arguments).map_err(Exit::Usage)?;
    let (task, matches) = match matches.subcommand() {
        Some(("put", put)) => {
            let task = Action::Put {
                id: put.get_one::<ImageId>("id").expect("required").clone(),
                file: put.get_one::<PathBuf>("file").expect("required").clone(),
                ttl: put.get_one::<Duration>("ttl").copied(),
            };
            (task, put)
        }
        Some(("health", health)) => (Action::Health, health),
        Some((_, serve)) => (Action::Serve, serve),
        None => (Action::Serve, &matches),
    };
    let settings = load(matches, variables).map_err(Exit::Settings)?;
    Ok(Command { settings, task })
}

/// Does what was asked.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command.task {
        Action::Serve => serve(command.settings).await,
        Action::Put { id, file, ttl } => put(&command.settings, &id, &file, ttl).await,
        Action::Health => health(&command.settings).await,
    }
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    let _log = log::start(&settings.log)?;
    make_room_for_connections(settings.limits.connections.get());
    let listeners = Listeners::bind(&settings)?;
    let url = listeners.main.url();
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);

    let app = App::build(settings).await?;
    let demo = demo::fill(&app.store, app.settings.embedded.demo).await?;
    // Where nobody listens, nothing is lost.
    let _ = std::io::stdout().write_all(welcome(&app, &url, &demo).as_bytes());
    let (stop, stopped) = oneshot::channel();
    let signals = async {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => server::Stop::Announced,
                _ = interrupt.recv() => server::Stop::AtOnce,
            }
        };
        let _ = stop.send(next().await);
        next().await
    };
    let stopped = async { stopped.await.unwrap_or(server::Stop::AtOnce) };
    tokio::select! {
        () = server::serve(app, listeners, stopped) => Ok(()),
        // Who asks again doesn't want to wait.
        _ = signals => anyhow::bail!("told to stop twice: requests in progress were cut"),
    }
}

/// Each connection is an open file, and the usual limit of 1,024 is lower than what is allowed to ask for.
fn make_room_for_connections(connections: usize) {
    const OTHER_FILES: u64 = 256;
    let wanted = connections as u64 + OTHER_FILES;
    match rlimit::increase_nofile_limit(wanted) {
        Ok(allowed) if allowed >= wanted => {}
        Ok(allowed) => tracing::warn!(
            allowed,
            wanted,
            "fewer files may be open than [limits] connections needs: raise LimitNOFILE or ulimit -Hn"
        ),
        Err(error) => tracing::warn!(%error, "the limit on open files is unknown"),
    }
}

/// What a person at a terminal wants to know next.
fn welcome(app: &App, url: &str, demo: &[ImageId]) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let store = match &*app.store {
        Store::Redis(_) => "Redis".to_owned(),
        Store::Embedded(store) => format!("the embedded store {}", store.path().display()),
    };
    let _ = writeln!(text, "afterimage serves {url}/images/{{id}} from {store}");
    let Some(first) = demo.first() else {
        return text;
    };
    let _ = writeln!(text, "\nDemo images to look at:");
    for id in demo {
        let _ = writeln!(text, "  {url}/images/{id}");
    }
    let _ = writeln!(text, "\nTime one, twice, to see it come from memory:");
    let _ = writeln!(text, "  curl -o /dev/null -sw @config/curl-format.txt {url}/images/{first}");
    let _ = writeln!(text, "\nAdd your own:");
    // As this very program was called: `cargo run` puts none on the path.
    let program = std::env::args().next().unwrap_or_else(|| "afterimage".to_owned());
    let _ = writeln!(text, "  {program} put my_image picture.png");
    text
}

/// Writes an image as a backend would: straight to Redis, or to the embedded store. A running server has
/// that store to itself, so it is asked to write instead.
async fn put(
    settings: &Settings,
    id: &ImageId,
    file: &Path,
    ttl: Option<Duration>,
) -> anyhow::Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("{} can't be read", file.display()))?;
    let media_type = sniff::sniff(&bytes)
        .with_context(|| format!("{} is no type of image that is served", file.display()))?;
    let value = Bytes::from(record::encode(&bytes, media_type, Some(SystemTime::now())));
    let limit = settings.records.max_value;
    anyhow::ensure!(
        value.len() <= limit,
        "{} makes a record of {} bytes, the limit is {limit} ([records] max_value)",
        file.display(),
        value.len()
    );
    let ttl = ttl.unwrap_or(settings.records.ttl);
    match Store::open(settings).await {
        Ok(store) => {
            store.put(id, value, Expiry::In(ttl), &Condition::Always).await?;
        }
        Err(error) if error.is::<InUse>() => {
            let path = format!("/images/{id}?ttl={}ms", ttl.as_millis());
            let listen = plain(settings).with_context(|| error.to_string())?;
            let token = auth::tokens(&settings.writes)?.into_iter().next();
            let (status, body) = client::send(listen, Method::PUT, &path, value, token.as_ref())
                .await
                .with_context(|| format!("{error}, and it can't be asked to write"))?;
            let body = String::from_utf8_lossy(&body);
            anyhow::ensure!(status.is_success(), "the server refused the image: {status} {body}");
        }
        Err(error) => return Err(error),
    }
    println!(
        "{id}: {} of {} bytes, for {}",
        media_type.as_str(),
        bytes.len(),
        humantime::format_duration(ttl)
    );
    Ok(())
}

/// Where the server can be asked by this program, which knows no authority to trust.
fn plain(settings: &Settings) -> anyhow::Result<&ListenOn> {
    let tls = !settings.http.tls_cert_file.as_os_str().is_empty();
    anyhow::ensure!(!tls, "the server at {} speaks TLS only", settings.http.listen);
    Ok(&settings.http.listen)
}

async fn health(settings: &Settings) -> anyhow::Result<()> {
    let listen = match &settings.admin.listen {
        Some(listen) => listen,
        None => plain(settings).context("set [admin] listen, where health is asked without TLS")?,
    };
    let (status, body) = client::send(listen, Method::GET, "/healthz", Bytes::new(), None).await?;
    anyhow::ensure!(status.is_success(), "unhealthy: {status} {}", String::from_utf8_lossy(&body));
    Ok(())
}

fn grammar() -> clap::Command {
    let settings = settings::described().into_iter().map(|setting| {
        Arg::new(setting.key.clone())
            .long(setting.flag())
            .help(setting.help)
            .value_name(setting.default.to_string().trim_matches('"').to_owned())
            .help_heading("Settings")
            .global(true)
    });
    clap::Command::new("afterimage")
        .version(env!("CARGO_PKG_VERSION"))
        .about(env!("CARGO_PKG_DESCRIPTION"))
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("A settings file; config/afterimage.toml shows all there is to set")
                .global(true),
        )
        .args(settings)
        .subcommand(clap::Command::new("serve").about("Serves images (the default)"))
        .subcommand(
            clap::Command::new("put")
                .about("Stores the image in FILE under ID, as a backend would")
                .arg(Arg::new("id").value_name("ID").required(true).value_parser(ImageId::parse))
                .arg(
                    Arg::new("file")
                        .value_name("FILE")
                        .required(true)
                        .value_parser(value_parser!(PathBuf)),
                )
                .arg(
                    Arg::new("ttl")
                        .long("ttl")
                        .value_name("DURATION")
                        .value_parser(settings::time_to_live)
                        .help("How long it lives, such as 90s; else [records] ttl"),
                ),
        )
        .subcommand(clap::Command::new("health").about("Asks a running server whether it is well"))
}

/// The layers, the weaker first: file, environment, flags.
fn load(
    matches: &ArgMatches,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> anyhow::Result<Settings> {
    // One that isn't UTF-8 can't be a setting that is right, and is none of ours unless it has our name.
    let variables: Vec<(String, String)> = variables
        .filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        })
        .collect();
    let file = matches.get_one::<PathBuf>("config").cloned().or_else(|| {
        let named = variables.iter().find(|(name, _)| name == "AFTERIMAGE_CONFIG");
        named.map(|(_, path)| PathBuf::from(path))
    });
    let mut layers: Vec<Override> = Vec::new();
    if let Some(file) = file {
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("the settings file {} can't be read", file.display()))?;
        layers.extend(settings::from_file(&file.display().to_string(), &text)?);
    }
    layers.extend(settings::from_environment(variables.into_iter())?);
    for setting in settings::described() {
        if let Some(text) = matches.get_one::<String>(&setting.key) {
            layers.push(setting.overridden(text, format!("--{}", setting.flag())));
        }
    }
    Settings::load(&layers).map_err(|error: SettingsError| error.into())
}
