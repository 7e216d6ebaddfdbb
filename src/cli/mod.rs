//! The command line: grammar, settings of the call, and dispatch to the commands.

mod client;
mod demo;
mod health;
mod put;
mod serve;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Arg, ArgMatches, value_parser};

use crate::image::ImageId;
use crate::settings::{self, Override, Settings};

/// A parsed call: an action, and the settings for it.
#[derive(Debug)]
pub struct Command {
    settings: Settings,
    action: Action,
}

#[derive(Debug)]
enum Action {
    Serve,
    Put { id: ImageId, file: PathBuf, ttl: Option<Duration> },
    Health,
}

/// Early exit: the call asks for help, or is wrong.
#[derive(Debug)]
pub enum Exit {
    /// The arguments are wrong, or ask for help or the version.
    Usage(clap::Error),
    /// The settings are wrong.
    Settings(anyhow::Error),
}

impl Exit {
    /// Prints the message and returns the exit code.
    #[must_use]
    pub fn print(&self) -> ExitCode {
        match self {
            Exit::Usage(error) => {
                let _ = error.print();
                ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
            }
            Exit::Settings(error) => {
                eprintln!("afterimage: {}", describe(error));
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
    let (action, matches) = match matches.subcommand() {
        Some(("put", put)) => {
            let action = Action::Put {
                id: put.get_one::<ImageId>("id").expect("required").clone(),
                file: put.get_one::<PathBuf>("file").expect("required").clone(),
                ttl: put.get_one::<Duration>("ttl").copied(),
            };
            (action, put)
        }
        Some(("health", health)) => (Action::Health, health),
        Some((_, serve)) => (Action::Serve, serve),
        None => (Action::Serve, &matches),
    };
    let settings = load(matches, variables).map_err(Exit::Settings)?;
    Ok(Command { settings, action })
}

/// Describes an error and its causes in one line. A cause that its error already quotes isn't repeated.
#[must_use]
pub fn describe(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.ends_with(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
    }
    line
}

/// Runs the command to its end.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command.action {
        Action::Serve => serve::run(command.settings).await,
        Action::Put { id, file, ttl } => put::run(&command.settings, &id, &file, ttl).await,
        Action::Health => health::run(&command.settings).await,
    }
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
    let renamed =
        settings::renamed().map(|(key, flag)| Arg::new(key).long(flag).hide(true).global(true));
    clap::Command::new("afterimage")
        .version(env!("CARGO_PKG_VERSION"))
        .about(env!("CARGO_PKG_DESCRIPTION"))
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("The settings file; config/afterimage.toml lists all settings")
                .global(true),
        )
        .args(settings)
        .args(renamed)
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
                        .help("Time to live, such as 90s; [records] ttl by default"),
                ),
        )
        .subcommand(clap::Command::new("health").about("Checks the health of a running server"))
}

/// Loads the settings from file, environment and flags: the later ones win.
fn load(
    matches: &ArgMatches,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> anyhow::Result<Settings> {
    // A name that isn't UTF-8 is none of ours; a value that isn't is refused by its setting.
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
            .with_context(|| format!("can't read the settings file {}", file.display()))?;
        layers.extend(settings::from_file(&file.display().to_string(), &text)?);
    }
    layers.extend(settings::from_environment(variables.into_iter())?);
    for setting in settings::described() {
        if let Some(text) = matches.get_one::<String>(&setting.key) {
            layers.push(setting.overridden(text, format!("--{}", setting.flag())));
        }
    }
    for (key, flag) in settings::renamed() {
        if let Some(text) = matches.get_one::<String>(key) {
            let value = toml::Value::String(text.clone());
            layers.push(Override { key: key.to_owned(), value, place: format!("--{flag}") });
        }
    }
    Ok(Settings::load(&layers)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    #[test]
    fn a_cause_that_its_error_quotes_is_not_repeated() {
        let error = anyhow::Error::new(StoreError::unreachable(std::io::Error::other("no route")));
        assert_eq!(describe(&error), "the store can't be reached: no route");
        let error = anyhow::anyhow!("no route").context("can't put the image");
        assert_eq!(describe(&error), "can't put the image: no route");
    }
}
