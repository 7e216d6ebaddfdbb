//! The peer: a Node process with sharp, which does one job at a time.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::installed;

/// A process that speaks the protocol of `peer.mjs`. It ends with this value.
pub(crate) struct Peer {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// Versions of sharp and libvips.
    pub(crate) versions: (String, String),
}

/// Result of a job.
pub(crate) struct Done {
    /// Wall time per image, in milliseconds.
    pub(crate) wall: f64,
    /// Processor time of all cores per image, in milliseconds.
    pub(crate) processor: f64,
    /// The last product, empty for raw pixels.
    pub(crate) product: Vec<u8>,
}

impl Peer {
    /// Installs sharp if it is missing, and starts it.
    pub(crate) fn start(cores: usize) -> Result<Peer, String> {
        let mut child = Command::new("node")
            .arg(installed::peer()?)
            // Node runs one job per thread of this pool, which has four by default.
            .env("UV_THREADPOOL_SIZE", cores.max(4).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("node: {error}"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("node has no pipes".to_owned());
        };
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.take_while(|line| sender.send(line.clone()).is_ok()).for_each(drop);
        });
        let mut peer = Peer { child, input, lines, versions: Default::default() };
        let hello = peer.answer()?;
        let version = |of: &str| hello[of].as_str().unwrap_or("?").to_owned();
        peer.versions = (version("sharp"), version("vips"));
        Ok(peer)
    }

    /// Does a job `iterations` times, `parallelism` at a time.
    pub(crate) fn run(
        &mut self,
        file: &Path,
        job: &Value,
        iterations: usize,
        parallelism: usize,
    ) -> Result<Done, String> {
        self.ask(&json!({
            "file": file.display().to_string(),
            "job": job,
            "iterations": iterations,
            "parallelism": parallelism,
            "keep": job["format"] != "raw",
        }))
    }

    /// The pixels of an image, three bytes each, as libvips decodes it.
    pub(crate) fn pixels(&mut self, file: &Path) -> Result<Vec<u8>, String> {
        let done = self.ask(&json!({
            "file": file.display().to_string(),
            "job": {"format": "raw"},
            "iterations": 1,
            "parallelism": 1,
            "keep": true,
        }));
        Ok(done?.product)
    }

    fn ask(&mut self, line: &Value) -> Result<Done, String> {
        writeln!(self.input, "{line}").map_err(|error| format!("sharp has ended: {error}"))?;
        let answer = self.answer()?;
        let figure = |name: &str| {
            answer[name].as_f64().ok_or(format!("no {name} in sharp's answer {answer}"))
        };
        let product = answer["product"].as_str().unwrap_or_default();
        Ok(Done {
            wall: figure("wall_ms")?,
            processor: figure("cpu_ms")?,
            product: STANDARD.decode(product).map_err(|error| error.to_string())?,
        })
    }

    fn answer(&mut self) -> Result<Value, String> {
        /// A round takes less than a second.
        const LONGEST: Duration = Duration::from_secs(20);
        let line = self.lines.recv_timeout(LONGEST);
        let line = line.map_err(|_late| "sharp has ended or doesn't answer".to_owned())?;
        let answer: Value = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        match answer["error"].as_str() {
            Some(error) => Err(format!("sharp: {error}")),
            None => Ok(answer),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
