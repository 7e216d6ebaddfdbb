//! Processes of the bench: their cores, their use of processor time and memory, and their end.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::installed::find;

/// Cores for servers and for load generators, in the syntax of `taskset -c`. Both `None` on a single core.
#[derive(Debug, Clone)]
pub(crate) struct Cores {
    pub(crate) servers: Option<String>,
    pub(crate) load: Option<String>,
    all: String,
}

impl Cores {
    /// Gives the first allowed core to servers, and the others to load generators.
    pub(crate) fn split() -> Cores {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let all = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let all = all.unwrap_or_default().trim().to_owned();
        let range = |range: &str| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse().ok()?..=last.parse().ok()?)
        };
        let allowed: Vec<u32> = all.split(',').filter_map(range).flatten().collect();
        match allowed.split_first() {
            Some((first, others)) if !others.is_empty() && find("taskset").is_some() => {
                let others: Vec<String> = others.iter().map(u32::to_string).collect();
                Cores { servers: Some(first.to_string()), load: Some(others.join(",")), all }
            }
            _ => Cores { servers: None, load: None, all },
        }
    }

    /// Moves this process, and with it later child processes, to the cores of load generators.
    pub(crate) fn move_this_process(&self) -> Result<()> {
        self.load.as_ref().map_or(Ok(()), |cores| taskset(cores))
    }

    /// Lets this process use all cores again.
    pub(crate) fn spread_this_process(&self) -> Result<()> {
        self.load.as_ref().map_or(Ok(()), |_| taskset(&self.all))
    }

    /// Cores for processes that may run on all allowed cores.
    pub(crate) fn everywhere(&self) -> Cores {
        Cores { servers: None, load: None, all: self.all.clone() }
    }
}

fn taskset(cores: &str) -> Result<()> {
    let mut command = Command::new("taskset");
    command.args(["-a", "-cp", cores, &std::process::id().to_string()]).stdout(Stdio::null());
    ensure!(command.status()?.success(), "this process can't be moved to cores {cores}");
    Ok(())
}

/// Command that runs a program on some cores, and stops it when this bench is killed.
pub(crate) fn command(cores: Option<&str>, program: impl AsRef<OsStr>) -> Command {
    let mut words: Vec<&OsStr> = Vec::new();
    if find("setpriv").is_some() {
        words.extend(["setpriv", "--pdeathsig", "TERM"].map(OsStr::new));
    }
    if let Some(cores) = cores {
        words.extend(["taskset", "-c", cores].map(OsStr::new));
    }
    words.push(program.as_ref());
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

/// A process that is killed on drop, with all its descendants.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    /// File with its output.
    pub(crate) log: PathBuf,
}

impl Process {
    pub(crate) fn start(name: &str, mut command: Command, log: &Path) -> Result<Process> {
        // Opened for appending, since the log is truncated while it is open.
        let file = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("{name} can't be started"))?;
        Ok(Process { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Fails with the last line of output if the process has ended by itself.
    pub(crate) fn alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} has ended ({status}): {}", self.name, last_line(&self.log));
        }
        Ok(())
    }

    /// Polls until the process is ready.
    pub(crate) fn until(&mut self, mut ready: impl FnMut() -> bool) -> Result<()> {
        const PATIENCE: Duration = Duration::from_secs(20);
        let begin = Instant::now();
        while !ready() {
            self.alive()?;
            ensure!(
                begin.elapsed() < PATIENCE,
                "{} isn't ready: {}",
                self.name,
                last_line(&self.log)
            );
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    pub(crate) fn cpu(&self) -> CpuTime {
        let members = tree(self.child.id());
        CpuTime::of(&members)
    }

    /// The sum of one line of proc(5)'s `status`, such as `VmRSS`, in bytes.
    pub(crate) fn memory(&self, line: &str) -> u64 {
        let of = |member: &Member| {
            let status = fs::read_to_string(format!("/proc/{}/status", member.pid)).ok()?;
            let value = status.lines().find_map(|it| it.strip_prefix(line)?.strip_prefix(':'))?;
            value.trim().trim_end_matches(" kB").parse::<u64>().ok()
        };
        tree(self.child.id()).iter().filter_map(of).sum::<u64>() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        const GRACE: Duration = Duration::from_secs(5);
        let members = tree(self.child.id());
        // SIGTERM first: killed at once, the masters of nginx and Varnish would leave their workers behind.
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let begin = Instant::now();
        while begin.elapsed() < GRACE && matches!(self.child.try_wait(), Ok(None)) {
            sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        for left in
            members.iter().filter(|it| Member::read(it.pid).is_some_and(|now| now.born == it.born))
        {
            let _ = Command::new("kill")
                .args(["-KILL", &left.pid.to_string()])
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// Last line of a log that isn't empty.
pub(crate) fn last_line(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    last.unwrap_or("it printed nothing").trim().to_owned()
}

/// Runs a program to its end, or kills it after a time limit. Returns its standard output.
pub(crate) fn run(name: &str, mut command: Command, limit: Duration) -> Result<String> {
    // Files, since a pipe without a reader fills up.
    let dir = tempfile::tempdir()?;
    let (output, errors) = (dir.path().join("out"), dir.path().join("err"));
    command.stdin(Stdio::null()).stdout(File::create(&output)?).stderr(File::create(&errors)?);
    let mut child = command.spawn().with_context(|| format!("{name} can't be started"))?;
    let status = wait(&mut child, limit).with_context(|| name.to_owned())?;
    let text = fs::read(&output)?;
    ensure!(
        status.success(),
        "{name} ended with {status}: {}",
        last_line(if fs::metadata(&errors)?.len() > 0 { &errors } else { &output })
    );
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if begin.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            bail!("it took more than {} s", limit.as_secs());
        }
        sleep(Duration::from_millis(10));
    }
}

/// A process and its start time, since its id may be reused.
#[derive(Debug, Clone, Copy)]
struct Member {
    pid: u32,
    parent: u32,
    born: u64,
    /// User and system time including ended threads, in hundredths of a second.
    ticks: u64,
}

impl Member {
    fn read(pid: u32) -> Option<Member> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses, and may contain some.
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |field: usize| fields.get(field)?.parse::<u64>().ok();
        Some(Member {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            born: number(19)?,
            ticks: number(11)? + number(12)?,
        })
    }
}

/// Returns a process and all its descendants.
fn tree(root: u32) -> Vec<Member> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|it| it.file_name().to_str()?.parse().ok());
    let all: Vec<Member> = pids.filter_map(Member::read).collect();
    let mut members: Vec<Member> = all.iter().filter(|it| it.pid == root).copied().collect();
    let mut next = 0;
    while let Some(parent) = members.get(next).map(|it| it.pid) {
        members.extend(all.iter().filter(|it| it.parent == parent));
        next += 1;
    }
    members
}

/// Processor time of a tree of processes.
#[derive(Debug)]
pub(crate) struct CpuTime {
    /// Nanoseconds by process and thread.
    threads: HashMap<(u32, String), u64>,
    ticks: u64,
}

impl CpuTime {
    fn of(members: &[Member]) -> CpuTime {
        let mut threads = HashMap::new();
        for member in members {
            let tasks = fs::read_dir(format!("/proc/{}/task", member.pid)).into_iter().flatten();
            for task in tasks.flatten() {
                let schedstat =
                    fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
                if let Some(time) = schedstat.split(' ').next().and_then(|it| it.parse().ok()) {
                    let thread = task.file_name().to_string_lossy().into_owned();
                    threads.insert((member.pid, thread), time);
                }
            }
        }
        CpuTime { threads, ticks: members.iter().map(|it| it.ticks).sum() }
    }

    pub(crate) fn since(&self, before: &CpuTime) -> Duration {
        const TICK: u64 = 10_000_000;
        // An ended thread is missing from the nanoseconds, but not from the ticks of its process.
        let complete = before.threads.keys().all(|thread| self.threads.contains_key(thread));
        if self.threads.is_empty() || !complete {
            return Duration::from_nanos(self.ticks.saturating_sub(before.ticks) * TICK);
        }
        let spent = self.threads.iter().map(|(thread, now)| {
            now.saturating_sub(before.threads.get(thread).copied().unwrap_or(0))
        });
        Duration::from_nanos(spent.sum())
    }
}
