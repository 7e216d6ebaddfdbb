//! The grammar of the command line. Its settings are those of the shipped file, by section.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::client::ServerAddress;
use super::{Action, NewImages, backup, list};
use crate::image::ImageId;
use crate::settings::{self, SettingInfo};

/// The widest that help is set: longer lines are hard to read.
const WIDEST_HELP: usize = 100;

/// Settings that people give on the command line most of the time, with the short names of their flags. They alone are in the
/// short help.
const USUAL: [(&str, &str, &str); 4] = [
    ("http.listen", "listen", "Address and port to serve on"),
    ("redis.url", "redis", "Redis to serve from, such as redis://127.0.0.1:6379/0"),
    ("embedded.dir", "dir", "Folder of the store that is used without Redis"),
    ("cache.bytes", "memory", "Most bytes of images to keep in memory"),
];

/// The version of the program, with its commit where that is known.
const VERSION: &str = match option_env!("PROGRAM_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};

pub(super) fn grammar() -> Command {
    let renamed =
        settings::renamed().map(|(key, flag)| Arg::new(key).long(flag).hide(true).global(true));
    Command::new("afterimage")
        .version(VERSION)
        .about(env!("CARGO_PKG_DESCRIPTION"))
        .max_term_width(WIDEST_HELP)
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("Settings file; `afterimage config` prints one with all settings")
                .global(true),
        )
        .arg(
            Arg::new("port")
                .long("port")
                .value_name("PORT")
                .help("Port to serve on, in place of that of --listen")
                .global(true),
        )
        .args(settings::described().iter().map(setting))
        .args(renamed)
        .after_help("`afterimage --help` has every setting, `afterimage COMMAND -h` the options of a command.")
        .after_long_help(
            "Each setting is also a line of the settings file and an environment variable: [cache] images, \
             AFTERIMAGE_CACHE_IMAGES. PORT, REDIS_URL and REDIS_URL_FILE are read as well.",
        )
        .subcommand(Command::new("serve").about("Serves images (the default)"))
        .subcommands([put(), get(), rm(), list_command(), export(), import()].map(on_store))
        .subcommand(Command::new("config").about("Prints the settings file, with all settings and their defaults"))
        .subcommand(Command::new("health").about("Asks a running server whether it is alive").arg(server()))
}

/// The flag of a setting.
fn setting(setting: &SettingInfo) -> Arg {
    let (section, _) = setting.key.split_once('.').unwrap_or_default();
    let arg = Arg::new(setting.key.clone()).value_name(value_name(setting)).global(true);
    let default = match &setting.default {
        toml::Value::String(text) if text.is_empty() => String::new(),
        toml::Value::String(text) => format!("\n\nDefault: {text}"),
        other => format!("\n\nDefault: {other}"),
    };
    let full = format!("{}{default}", setting.help);
    if let Some((_, short, help)) = USUAL.iter().find(|(key, ..)| *key == setting.key) {
        let name = format!("In full --{}: a setting in [{section}].", setting.flag());
        let arg = arg.long(*short).alias(setting.flag()).help(*help);
        return arg.long_help(format!("{full}\n\n{name}"));
    }
    let first = setting.help.split_inclusive(". ").next().unwrap_or_default().trim_end();
    arg.long(setting.flag())
        .help(first.to_owned())
        .long_help(full)
        .hide_short_help(true)
        .help_heading(format!("[{section}]"))
}

/// The name of a setting's flag, without the leading dashes.
pub(super) fn flag(setting: &SettingInfo) -> String {
    match USUAL.iter().find(|(key, ..)| *key == setting.key) {
        Some((_, short, _)) => (*short).to_owned(),
        None => setting.flag(),
    }
}

/// The kind of a setting's value, for the help.
fn value_name(setting: &SettingInfo) -> &'static str {
    let (_, name) = setting.key.split_once('.').unwrap_or_default();
    match &setting.default {
        toml::Value::Boolean(_) => "BOOL",
        toml::Value::Integer(_) => "NUMBER",
        toml::Value::Array(_) => "LIST",
        toml::Value::String(_) if name == "listen" => "ADDRESS",
        toml::Value::String(_) if name.ends_with("_file") => "FILE",
        toml::Value::String(_) if name == "dir" => "DIR",
        toml::Value::String(_) if name.ends_with("url") => "URL",
        toml::Value::String(text) if text.starts_with(|it: char| it.is_ascii_digit()) => {
            if text.ends_with('B') { "SIZE" } else { "DURATION" }
        }
        _ => "TEXT",
    }
}

/// A command on a store. It has all settings as well, but its help has only those that name the store.
fn on_store(command: Command) -> Command {
    let is_about_it =
        |setting: &SettingInfo| ["redis.url", "embedded.dir"].contains(&&*setting.key);
    let settings = settings::described().into_iter().filter(|it| !is_about_it(it));
    // The port isn't that of a server to start: it names the running one.
    let port = Arg::new("port").long("port").hide(true).global(true);
    command.args(settings.map(|it| setting(&it).hide(true))).arg(port)
}

fn put() -> Command {
    Command::new("put")
        .about("Stores images: one under an ID, or files under their names")
        .override_usage("afterimage put [OPTIONS] ID FILE\n       afterimage put [OPTIONS] ID - < FILE\n       afterimage put [OPTIONS] FILE...")
        .arg(
            Arg::new("images")
                .value_name("ID FILE | ID - | FILE...")
                .required(true)
                .num_args(1..)
                .value_parser(value_parser!(PathBuf))
                .help("An id and a file, an id and - for standard input, or files, whose names become the ids"),
        )
        .arg(
            Arg::new("ttl")
                .long("ttl")
                .value_name("DURATION")
                .value_parser(settings::time_to_live)
                .help("Time to live, such as 90s or 2h; [records] ttl by default"),
        )
        .arg(server())
}

fn get() -> Command {
    Command::new("get")
        .about("Writes an image to a file or standard output")
        .arg(id())
        .arg(
            Arg::new("file")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .default_value("-")
                .help("The file to write; - is standard output"),
        )
        .arg(
            Arg::new("output")
                .short('o')
                .long("output")
                .hide(true)
                .conflicts_with("file")
                .value_parser(value_parser!(PathBuf)),
        )
        .arg(server())
}

fn rm() -> Command {
    Command::new("rm").about("Removes images").arg(id().num_args(1..)).arg(server())
}

fn list_command() -> Command {
    Command::new("list")
        .about("Lists the images in the store")
        .arg(Arg::new("beginning").value_name("PREFIX").help("Only ids that begin with it"))
        .arg(prefix().hide(true).conflicts_with("beginning"))
        .arg(
            Arg::new("ids")
                .long("ids")
                .action(ArgAction::SetTrue)
                .help("Prints the ids alone, one a line"),
        )
        .arg(server())
}

fn export() -> Command {
    Command::new("export")
        .about("Writes all records to a file, as a backup")
        .arg(file("The file to write; - is standard output"))
        .arg(prefix())
        .arg(server())
}

fn import() -> Command {
    Command::new("import")
        .about("Stores the records of such a file")
        .arg(file("The file to read; - is standard input"))
        .arg(
            Arg::new("replace")
                .long("replace")
                .action(ArgAction::SetTrue)
                .help("Replaces images that are there; otherwise they are kept"),
        )
        .arg(server())
}

fn id() -> Arg {
    Arg::new("id")
        .value_name("ID")
        .required(true)
        .value_parser(ImageId::parse)
        .help("Id of an image")
}

fn file(help: &'static str) -> Arg {
    Arg::new("file")
        .value_name("FILE")
        .required(true)
        .value_parser(value_parser!(PathBuf))
        .help(help)
}

fn prefix() -> Arg {
    Arg::new("prefix").long("prefix").value_name("TEXT").help("Only ids that begin with it")
}

fn server() -> Arg {
    Arg::new("server")
        .long("server")
        .value_name("ADDRESS")
        .value_parser(ServerAddress::parse)
        .help("A running server to ask, such as http://127.0.0.1:8000, in place of the store")
}

/// Reads the action of a call.
pub(super) fn action(matches: &ArgMatches) -> Action {
    let Some((name, matches)) = matches.subcommand() else { return Action::Serve };
    let server = || {
        let named = matches.get_one::<ServerAddress>("server").cloned();
        named.or_else(|| ServerAddress::parse(matches.get_one::<String>("port")?).ok())
    };
    let file = || matches.get_one::<PathBuf>("file").expect("required").clone();
    let prefix = || matches.get_one::<String>("prefix").cloned().unwrap_or_default();
    match name {
        "put" => Action::Put {
            images: NewImages(
                matches.get_many::<PathBuf>("images").expect("required").cloned().collect(),
            ),
            ttl: matches.get_one::<Duration>("ttl").copied(),
            server: server(),
        },
        "get" => Action::Get {
            id: matches.get_one::<ImageId>("id").expect("required").clone(),
            file: matches.get_one::<PathBuf>("output").cloned().unwrap_or_else(file),
            server: server(),
        },
        "rm" => Action::Remove {
            ids: matches.get_many::<ImageId>("id").expect("required").cloned().collect(),
            server: server(),
        },
        "list" => Action::List(list::Options {
            prefix: matches.get_one::<String>("beginning").cloned().unwrap_or_else(prefix),
            ids_alone: matches.get_flag("ids"),
            server: server(),
        }),
        "export" => {
            Action::Export(backup::Export { file: file(), prefix: prefix(), server: server() })
        }
        "import" => Action::Import(backup::Import {
            file: file(),
            replaces: matches.get_flag("replace"),
            server: server(),
        }),
        "config" => Action::Config,
        "health" => Action::Health { server: matches.get_one("server").cloned() },
        _ => Action::Serve,
    }
}
