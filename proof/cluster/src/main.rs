//! Checks the rules by which Afterimage is to serve from a Redis Cluster. `README.md` explains the model.

mod client;
mod model;
mod rules;
mod run;
mod scenario;
mod scenarios;
mod servers;
mod state;
mod words;

use std::process::ExitCode;

fn main() -> ExitCode {
    let argument = std::env::args().nth(1);
    match argument.as_deref() {
        None => run::all(false),
        Some("verbose") => run::all(true),
        Some("timelines") => run::timelines(),
        Some(name) if run::without(name) || run::one(name) => ExitCode::SUCCESS,
        Some(other) => {
            eprintln!(
                "unknown argument {other:?}: the argument must be `verbose`, `timelines`, a rule, or the beginning of a \
                 scenario's name"
            );
            ExitCode::FAILURE
        }
    }
}
