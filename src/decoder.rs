//! A process for decoders that this process can't rely on.
//!
//! AVIF and JPEG XL have large decoders. A panic in that of AVIF ends its process, since it crosses a C interface; neither can be
//! interrupted, and both allocate what a file asks for. So each picture is decoded by a process of its own, with limits on memory and
//! time that the kernel enforces. It hands the pixels back as PNG without compression.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use image::DynamicImage;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use rlimit::Resource;
use rustix::process::Signal;

use crate::image::MediaType;
use crate::picture::{self, PictureError, RenderLimits};

/// The program's first argument in a decoder process. It is no command for people.
const ARGUMENT: &str = "decode-picture";

/// Memory of a decoder process beside that for the picture: its heap at start, and buffers.
const BASE_MEMORY: u64 = 32 << 20;

/// Time for a picture without a deadline.
const LONGEST: Duration = Duration::from_mins(1);

/// Exit codes for the reasons without a picture. Their text is on standard output.
const BROKEN: u8 = 10;
const UNSUPPORTED: u8 = 11;
const TIMED_OUT: u8 = 12;

/// Starts decoder processes.
#[derive(Debug, Clone)]
pub(crate) struct Decoder {
    program: Arc<Path>,
}

impl Decoder {
    /// Decodes with `program`, which is Afterimage.
    pub(crate) fn new(program: &Path) -> Decoder {
        Decoder { program: program.into() }
    }

    /// Returns a picture in a format that this process decodes: as it is, or decoded and as PNG.
    pub(crate) fn readable<'a>(
        &self,
        bytes: &'a [u8],
        media_type: MediaType,
        limits: RenderLimits,
    ) -> Result<(Cow<'a, [u8]>, MediaType), PictureError> {
        if !media_type.is_decoded_apart() {
            return Ok((Cow::Borrowed(bytes), media_type));
        }
        let needed = picture::decoding_memory(bytes, media_type, limits)?;
        let now = Instant::now();
        let time = limits.deadline.map_or(LONGEST, |it| it.saturating_duration_since(now));
        let job = Job { media_type, length: bytes.len(), pixels: limits.pixels, needed, time };
        let unavailable = |error: io::Error| PictureError::NoDecoder(error.to_string());
        let mut child = self.command(&job).spawn().map_err(unavailable)?;
        let outcome = exchange(&mut child, bytes, &job);
        if outcome.is_err() {
            let _ = child.kill();
        }
        let status = child.wait().map_err(unavailable)?;
        let output = outcome.map_err(unavailable)?;
        match verdict(status, &output) {
            None => Ok((Cow::Owned(output), MediaType::Png)),
            Some(_killed) if now.elapsed() >= time => Err(PictureError::DecodingTimedOut),
            Some(error) => Err(error),
        }
    }

    fn command(&self, job: &Job) -> Command {
        let mut command = Command::new(&*self.program);
        command.arg(ARGUMENT).args(job.arguments());
        // Secrets are in the environment, and nothing there is for it.
        command.env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command
    }
}

/// Hands the file over, and reads the answer. The process reads everything before it writes. It is killed if it takes too long.
fn exchange(child: &mut Child, bytes: &[u8], job: &Job) -> io::Result<Vec<u8>> {
    let pipe = || io::Error::other("it has no pipe");
    let mut stdin = child.stdin.take().ok_or_else(pipe)?;
    let stdout = child.stdout.take().ok_or_else(pipe)?;
    let (done, is_done) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        std::thread::Builder::new().spawn_scoped(scope, move || {
            if is_done.recv_timeout(job.time) == Err(RecvTimeoutError::Timeout) {
                let _ = child.kill();
            }
        })?;
        let mut output = Vec::new();
        let exchanged = match stdin.write_all(bytes) {
            // A process that has ended already tells why.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            Ok(()) | Err(_) => {
                drop(stdin);
                stdout.take(job.needed + BASE_MEMORY).read_to_end(&mut output)
            }
        };
        drop(done);
        exchanged.map(|_read| output)
    })
}

/// Returns the reason for which there is no picture, if there is none.
fn verdict(status: ExitStatus, output: &[u8]) -> Option<PictureError> {
    let text = || String::from_utf8_lossy(output).into_owned();
    let signal = status.signal().and_then(Signal::from_named_raw);
    if let Some(Signal::HUP | Signal::INT | Signal::KILL | Signal::TERM) = signal {
        // Somebody else has ended it, such as a kernel without memory.
        return Some(PictureError::NoDecoder(format!("it ended with {status}")));
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    match code {
        Some(0) => None,
        Some(BROKEN) => Some(PictureError::Broken(text())),
        Some(UNSUPPORTED) => Some(PictureError::Unsupported(text())),
        Some(TIMED_OUT) => Some(PictureError::DecodingTimedOut),
        // A panic, too much memory, or a fault.
        _ => Some(PictureError::Unsupported(format!("the decoder ended with {status}"))),
    }
}

/// A picture to be decoded.
#[derive(Debug, PartialEq, Eq)]
struct Job {
    media_type: MediaType,
    length: usize,
    /// Most pixels.
    pixels: u64,
    /// Bytes that decoding takes at most.
    needed: u64,
    time: Duration,
}

impl Job {
    fn arguments(&self) -> [String; 5] {
        [
            self.media_type.as_str().to_owned(),
            self.length.to_string(),
            self.pixels.to_string(),
            self.needed.to_string(),
            self.time.as_millis().to_string(),
        ]
    }

    fn parse(arguments: impl Iterator<Item = OsString>) -> Option<Job> {
        let arguments: Vec<String> =
            arguments.map(|it| it.into_string().ok()).collect::<Option<_>>()?;
        let [media_type, length, pixels, needed, time] = &arguments[..] else { return None };
        Some(Job {
            media_type: MediaType::named(media_type)?,
            length: length.parse().ok()?,
            pixels: pixels.parse().ok()?,
            needed: needed.parse().ok()?,
            time: Duration::from_millis(time.parse().ok()?),
        })
    }
}

/// Decodes a picture, if that is what this process was started for, and returns its exit code.
#[must_use]
pub fn run_if_asked(mut arguments: impl Iterator<Item = OsString>) -> Option<u8> {
    if arguments.nth(1)? != ARGUMENT {
        return None;
    }
    let outcome = Job::parse(arguments)
        .ok_or_else(|| {
            PictureError::Unsupported(
                "the decoder needs a media type, a length, limits of pixels and bytes, and a time"
                    .to_owned(),
            )
        })
        .and_then(|job| run(&job));
    let mut stdout = io::stdout().lock();
    let (code, text) = match outcome {
        // Half a picture is no text of an error.
        Ok(picture) => return Some(u8::from(write(&picture, &mut stdout).is_err())),
        Err(PictureError::Broken(text)) => (BROKEN, text),
        Err(PictureError::Unsupported(text)) => (UNSUPPORTED, text),
        Err(error) if error.is_timeout() => (TIMED_OUT, String::new()),
        Err(error) => (UNSUPPORTED, error.to_string()),
    };
    let _ = stdout.write_all(text.as_bytes());
    Some(code)
}

fn run(job: &Job) -> Result<DynamicImage, PictureError> {
    let failed = |error: io::Error| PictureError::Unsupported(error.to_string());
    restrict(job).map_err(failed)?;
    let deadline = Instant::now() + job.time;
    let mut bytes = Vec::with_capacity(job.length);
    io::stdin().lock().take(job.length as u64).read_to_end(&mut bytes).map_err(failed)?;
    let limits = RenderLimits { pixels: job.pixels, deadline: Some(deadline) };
    picture::decode::decode(&bytes, job.media_type, limits)
}

/// Bounds what this process can take, and ends it with the one that started it.
fn restrict(job: &Job) -> io::Result<()> {
    let memory = job.needed.saturating_add(BASE_MEMORY);
    Resource::DATA.set(memory, memory)?;
    let seconds = job.time.as_secs() + 2;
    Resource::CPU.set(seconds, seconds)?;
    Resource::CORE.set(0, 0)?;
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}

fn write(picture: &DynamicImage, to: impl Write) -> image::ImageResult<()> {
    let encoder =
        PngEncoder::new_with_quality(to, CompressionType::Uncompressed, FilterType::NoFilter);
    picture.write_with_encoder(encoder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        let time = Duration::from_millis(1500);
        Job { media_type: MediaType::Avif, length: 7, pixels: 50_000_000, needed: 1 << 20, time }
    }

    #[test]
    fn a_job_is_passed_in_arguments() {
        let arguments = job().arguments().map(OsString::from);
        assert_eq!(Job::parse(arguments.clone().into_iter()), Some(job()));
        assert_eq!(Job::parse(arguments.into_iter().skip(1)), None);
        assert_eq!(
            Job::parse(["image/avif", "x", "1", "1", "1"].map(Into::into).into_iter()),
            None
        );
    }

    #[test]
    fn other_calls_are_not_for_the_decoder() {
        for arguments in [&["afterimage"][..], &["afterimage", "put", "a.png"], &[]] {
            assert_eq!(run_if_asked(arguments.iter().map(Into::into)), None);
        }
    }

    #[test]
    fn the_end_of_the_process_tells_why_there_is_no_picture() {
        let exit = |code: u8| ExitStatus::from_raw(i32::from(code) << 8);
        assert_eq!(verdict(exit(0), b"pixels"), None);
        let broken = PictureError::Broken("cut off".to_owned());
        assert_eq!(verdict(exit(BROKEN), b"cut off"), Some(broken));
        assert_eq!(verdict(exit(TIMED_OUT), b""), Some(PictureError::DecodingTimedOut));
        let killed = verdict(ExitStatus::from_raw(9), b"half a picture");
        assert!(matches!(killed, Some(PictureError::NoDecoder(_))), "{killed:?}");
        for status in [exit(101), ExitStatus::from_raw(6)] {
            let error = verdict(status, b"half a picture");
            assert!(matches!(error, Some(PictureError::Unsupported(_))), "{error:?}");
        }
    }

    #[test]
    fn a_program_that_is_missing_is_no_fault_of_the_picture() {
        let decoder = Decoder::new(Path::new("/nowhere/afterimage"));
        let limits = RenderLimits { pixels: 10_000, deadline: None };
        let png = decoder.readable(b"as it is", MediaType::Png, limits).unwrap();
        assert_eq!((&*png.0, png.1), (&b"as it is"[..], MediaType::Png));
        let avif = include_bytes!("../tests/cases/avif-8-bits.avif");
        let error = decoder.readable(avif, MediaType::Avif, limits);
        assert!(matches!(error, Err(PictureError::NoDecoder(_))), "{error:?}");
    }
}
