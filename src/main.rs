//! The program: parses its call and runs it.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
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
