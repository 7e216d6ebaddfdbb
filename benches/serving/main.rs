//! Afterimage beside nginx, Varnish and two Python backends, on this machine and in one run.
//!
//! `cargo bench --bench serving`, with `-- quick` for a first look, `-- only=hit,cold,zipf,open,memory` for some of its
//! sections, `-- against=PATH` for another build of Afterimage as one more peer. `benches/README.md` describes the
//! measurements.

mod bench;
mod cells;
mod client;
mod cold;
mod floor;
mod hit;
mod images;
mod installed;
mod load;
mod memory;
mod open;
mod open_loop;
mod options;
mod plot;
mod process;
mod report;
mod servers;
mod store;
mod table;
mod targets;
mod zipf;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use bench::Bench;
use cells::Results;
use options::{Options, Section};
use targets::Target;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((floor::ARGUMENT, served)) = arguments.split_first().map(|it| (&**it.0, it.1)) {
        return done(floor::serve(served).map(|never| match never {}));
    }
    // `cargo bench` adds `--bench`. A test of all targets doesn't, and shouldn't take half an hour.
    if !arguments.iter().any(|it| it == "--bench") {
        println!("Run this with `cargo bench --bench serving`.");
        return ExitCode::SUCCESS;
    }
    let options = Options::parse(arguments.into_iter().filter(|it| it != "--bench"));
    done(options.and_then(Bench::prepare).and_then(|bench| run(&bench)))
}

fn done(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("serving: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(bench: &Bench) -> Result<()> {
    let begin = Instant::now();
    let machine = machine(bench);
    print_machine(&machine, bench);
    let mut results = Results::default();
    for section in &bench.options.only {
        println!("\n## {}\n", section.name());
        let section_begin = Instant::now();
        let done = match section {
            Section::Hit => hit::run(bench, &mut results),
            Section::Cold => cold::run(bench, &mut results),
            Section::Zipf => zipf::run(bench, &mut results),
            Section::Open => open::run(bench, &mut results),
            Section::Memory => memory::run(bench, &mut results),
        };
        if let Err(error) = done {
            println!("This section stopped early: {error:#}.\n");
        }
        eprintln!("{} took {:.0?}", section.name(), section_begin.elapsed());
    }
    println!("\n## targets\n");
    let targets = targets::all(bench, &results);
    targets::print(&targets);
    write(bench, &results, &machine, &targets)?;
    println!("{} minutes in all.", minutes(begin.elapsed()));
    Ok(())
}

fn minutes(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() / 60.0)
}

fn write(bench: &Bench, results: &Results, machine: &Value, targets: &[Target]) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/serving");
    fs::create_dir_all(&folder)?;
    let all = json!({
        "quick": bench.options.quick,
        "rounds": bench.options.rounds(),
        "seconds": bench.options.seconds(),
        "machine": machine,
        "cells": results.json(),
        "targets": targets.iter().map(Target::json).collect::<Vec<_>>(),
    });
    fs::write(folder.join("result.json"), serde_json::to_vec_pretty(&all)?)?;
    println!("All figures: target/serving/result.json");
    if let Some(svg) = plot::svg(results) {
        fs::write(folder.join("serving.svg"), svg)?;
        println!("Processor time of a hit: target/serving/serving.svg");
    }
    Ok(())
}

fn machine(bench: &Bench) -> Value {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let python = match &bench.python {
        Ok(python) => installed::version(&python.to_string_lossy(), "--version"),
        Err(why) => why.clone(),
    };
    let program = |path: &Path| installed::version(&path.to_string_lossy(), "--version");
    let cores = |list: Option<&String>| {
        list.map_or("all (only one core, or no taskset)", |it| it.as_str()).to_owned()
    };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    json!({
        "afterimage": program(&bench.afterimage),
        "afterimage, against": bench.against.as_deref().map_or_else(|| "none".to_owned(), program),
        // A load of 0.5 is enough to spoil the figures: see benches/README.md.
        "load average before": load.split(' ').next(),
        "processor": model.map_or("unknown", |it| it.1),
        "kernel": kernel.trim(),
        "cores of servers": cores(bench.cores.servers.as_ref()),
        "cores of load": cores(bench.cores.load.as_ref()),
        "redis-server": installed::version("redis-server", "--version"),
        "nginx": installed::version("nginx", "-v"),
        "Varnish": installed::version("varnishd", "-V"),
        "Python": python,
        "wrk": installed::version("wrk", "-v"),
        "h2load": installed::version("h2load", "--version"),
    })
}

fn print_machine(machine: &Value, bench: &Bench) {
    println!("# Serving\n");
    for (name, value) in machine.as_object().into_iter().flatten() {
        let value = value.as_str().unwrap_or("unknown");
        println!("- {name}: {value}");
    }
    println!(
        "\n{} rounds of {} s, with the servers taking turns in each round; medians. Ratios are taken round by round, with \
         the lowest and the highest in parentheses. CPU is the processor time of a server's processes; Redis's has a \
         column of its own. p50 and p99 come from a closed loop unless stated otherwise, which hardly shows stalls.",
        bench.options.rounds(),
        bench.options.seconds(),
    );
}
