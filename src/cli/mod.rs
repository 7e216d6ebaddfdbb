//! The command line: settings of the call, and dispatch to the commands.

mod backup;
mod client;
mod demo;
mod grammar;
mod health;
mod images;
mod list;
mod new_file;
mod put;
mod reload;
mod serve;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::ArgMatches;

use self::client::ServerAddress;
use self::images::{Access, Images};
use self::new_file::NewFile;
use self::put::NewImages;
use crate::image::ImageId;
use crate::settings::{self, Override, Settings};

/// A parsed call: an action, and the settings for it.
#[derive(Debug)]
pub struct Command {
    loaded: LoadedSettings,
    source: SettingsSource,
    action: Action,
}

#[derive(Debug)]
enum Action {
    Serve,
    Put { images: NewImages, ttl: Option<Duration>, server: Option<ServerAddress> },
    Get { id: ImageId, file: PathBuf, server: Option<ServerAddress> },
    Remove { ids: Vec<ImageId>, server: Option<ServerAddress> },
    List(list::Options),
    Export(backup::Export),
    Import(backup::Import),
    Config,
    Health { server: Option<ServerAddress> },
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
    let matches = grammar::grammar().try_get_matches_from(arguments).map_err(Exit::Usage)?;
    let action = grammar::action(&matches);
    let matches = match matches.subcommand() {
        Some((_, of_command)) => of_command.clone(),
        None => matches,
    };
    // A name that isn't UTF-8 is none of ours; a value that isn't is refused by its setting.
    let variables = variables
        .filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        })
        .collect();
    let source = SettingsSource { matches, variables };
    let loaded = source.load().map_err(Exit::Settings)?;
    Ok(Command { loaded, source, action })
}

/// Reads the settings of arguments and variables. Opens no file and looks no name up: `None` if they name a settings file or a
/// server.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_settings(
    arguments: impl Iterator<Item = OsString>,
    variables: Vec<(String, String)>,
) -> Result<Option<toml::Table>, Exit> {
    let grammar = grammar::grammar().mut_subcommands(|it| {
        it.mut_args(|it| match it.get_id() {
            id if id == "server" => it.value_parser(clap::value_parser!(String)),
            _ => it,
        })
    });
    let matches = grammar.try_get_matches_from(arguments).map_err(Exit::Usage)?;
    let matches = match matches.subcommand() {
        Some((_, of_command)) => of_command.clone(),
        None => matches,
    };
    let names_file = variables.iter().any(|(name, _)| name == "AFTERIMAGE_CONFIG");
    if names_file || matches.get_one::<PathBuf>("config").is_some() {
        return Ok(None);
    }
    let layers = SettingsSource { matches, variables }.layers().map_err(Exit::Settings)?;
    let loaded = Settings::load_with_table(&layers);
    loaded.map(|(_, table)| Some(table)).map_err(|error| Exit::Settings(error.into()))
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
    let Command { loaded, source, action } = command;
    let settings = &loaded.settings;
    match action {
        Action::Serve => serve::run(loaded, source).await,
        Action::Put { images, ttl, server } => put::run(settings, images, ttl, server).await,
        Action::Get { id, file, server } => get(settings, &id, &file, server).await,
        Action::Remove { ids, server } => remove(settings, &ids, server).await,
        Action::List(options) => list::run(settings, options).await,
        Action::Export(options) => backup::export(settings, options).await,
        Action::Import(options) => backup::import(settings, options).await,
        Action::Config => print(settings::SHIPPED.as_bytes()).map(|_reader| ()),
        Action::Health { server } => health::run(settings, server).await,
    }
}

/// `get`: writes an image to a file or standard output.
async fn get(
    settings: &Settings,
    id: &ImageId,
    file: &Path,
    server: Option<ServerAddress>,
) -> anyhow::Result<()> {
    let is_stdout = is_dash(file);
    anyhow::ensure!(
        !(is_stdout && std::io::stdout().is_terminal()),
        "an image doesn't go to a terminal: name a file, as in `get {id} picture.png`"
    );
    let bytes = Images::open(settings, server, Access::Read).await?.get(id).await?;
    let bytes = bytes.with_context(|| format!("there is no image {id}"))?;
    if is_stdout {
        print(&bytes)?;
        return Ok(());
    }
    let new = NewFile::beside(file)?;
    let written = new.file.try_clone().and_then(|mut file| file.write_all(&bytes));
    written.and_then(|()| new.keep()).with_context(|| format!("can't write {}", file.display()))
}

/// `rm`: removes images.
async fn remove(
    settings: &Settings,
    ids: &[ImageId],
    server: Option<ServerAddress>,
) -> anyhow::Result<()> {
    let store = Images::open(settings, server, Access::Read).await?;
    let mut failures = Failures::default();
    for id in ids {
        match store.remove(id).await {
            Ok(true) => {
                if let Err(error) = say(&format!("{id}: removed from {}", store.place())) {
                    failures.tell(&error);
                }
            }
            Ok(false) => failures.tell(&anyhow::anyhow!("there is no image {id}")),
            Err(error) => failures.tell(&error.context(format!("{id} was not removed"))),
        }
    }
    failures.end()
}

/// The reader of standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    Reads,
    /// It has seen enough, as `head` has. That is no failure.
    Gone,
}

/// Writes to standard output.
fn print(bytes: &[u8]) -> anyhow::Result<Reader> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(Reader::Reads),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error).context("can't write to standard output"),
    }
}

/// Writes a line to standard output.
fn say(line: &str) -> anyhow::Result<()> {
    print(format!("{line}\n").as_bytes()).map(|_reader| ())
}

/// True for `-`, which is standard input or output.
fn is_dash(file: &Path) -> bool {
    file.as_os_str() == "-"
}

/// Failures of a command that goes on after each.
#[derive(Default)]
struct Failures(usize);

/// The failures of a command, which were told already.
#[derive(Debug, thiserror::Error)]
#[error("{0} failures")]
pub struct Told(usize);

impl Failures {
    fn tell(&mut self, error: &anyhow::Error) {
        // Part of it may be from a file, and must not steer the terminal.
        let text = describe(error);
        let mut line = String::with_capacity(text.len());
        for character in text.chars() {
            if character.is_control() {
                line.extend(character.escape_default());
            } else {
                line.push(character);
            }
        }
        eprintln!("afterimage: {line}");
        self.0 += 1;
    }

    /// Fails if anything has.
    fn end(self) -> anyhow::Result<()> {
        match self.0 {
            0 => Ok(()),
            failures => Err(Told(failures).into()),
        }
    }
}

/// The settings of a call.
#[derive(Debug)]
struct LoadedSettings {
    settings: Settings,
    /// The same by section and name, for comparisons.
    table: toml::Table,
}

/// The settings as they were given. The file is read again at each reload.
#[derive(Debug)]
struct SettingsSource {
    matches: ArgMatches,
    variables: Vec<(String, String)>,
}

impl SettingsSource {
    /// Loads the settings from file, environment and flags: the later ones win.
    fn load(&self) -> anyhow::Result<LoadedSettings> {
        let (mut settings, table) = Settings::load_with_table(&self.layers()?)?;
        settings.read_url_file()?;
        Ok(LoadedSettings { settings, table })
    }

    fn layers(&self) -> anyhow::Result<Vec<Override>> {
        let SettingsSource { matches, variables } = self;
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
        layers.extend(settings::from_environment(variables.iter().cloned())?);
        let described = settings::described();
        let flags = described.iter().filter_map(|setting| {
            let text = matches.get_one::<String>(&setting.key)?;
            Some(setting.overridden(text, format!("--{}", grammar::flag(setting))))
        });
        layers.extend(settings::from_flags(flags)?);
        if let Some(text) = matches.get_one::<String>("port") {
            layers.push(settings::from_port(text, "--port")?);
        }
        for (key, flag) in settings::renamed() {
            if let Some(text) = matches.get_one::<String>(key) {
                let value = toml::Value::String(text.clone());
                layers.push(Override { key: key.to_owned(), value, place: format!("--{flag}") });
            }
        }
        Ok(layers)
    }
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
