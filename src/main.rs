//! The program: parses its call and runs it.

use std::process::ExitCode;

fn main() -> ExitCode {
    match afterimage::run_decoder_if_asked(std::env::args_os()) {
        Some(code) => ExitCode::from(code),
        None => run(),
    }
}

#[tokio::main]
async fn run() -> ExitCode {
    let command = match afterimage::cli::parse(std::env::args_os(), std::env::vars_os()) {
        Ok(command) => command,
        Err(exit) => return exit.print(),
    };
    match afterimage::cli::run(command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if error.is::<afterimage::cli::Told>() {
                return ExitCode::FAILURE;
            }
            eprintln!("afterimage: {}", afterimage::cli::describe(&error));
            ExitCode::FAILURE
        }
    }
}
