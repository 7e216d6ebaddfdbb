//! The soak: faults in an order by a seed, beside writers, readers and a stream of events, with samples of the server's memory,
//! descriptors and latency. `tests/soak/report.py` makes a page of the samples.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper::Method;

use crate::events::Events;
use crate::fault_checker::{Checked, Fault, Meter, World, Written, begin_write, end_write, keys};
use crate::harness::s3::{Fault as S3Fault, Faulty};
use crate::harness::{Client, Flavour, Process, S3, get, png, until};

long_tests! {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)] faults_at_random_leave_no_answer_too_old
}

/// The number of the first image that is written over HTTP.
const PUT_KEYS: u64 = 100;

/// Treatment of requests to the object store.
const S3_ANSWERS: u8 = 0;
const S3_REFUSES: u8 = 1;
const S3_HANGS: u8 = 2;

async fn faults_at_random_leave_no_answer_too_old() {
    let variable = |name: &str| std::env::var(name).ok();
    // A fault on each kind of server shows that the soak works.
    let minutes = variable("AFTERIMAGE_TEST_RANDOM_FAULTS_MINUTES");
    let minutes: f64 = minutes.map_or(0.0, |it| it.parse().expect("a number of minutes"));
    let seed = variable("AFTERIMAGE_TEST_SEED");
    let seed = seed.map_or_else(|| fastrand::u64(..1 << 32), |it| it.parse().expect("a seed"));
    println!("soak: seed {seed}, {minutes} minutes");
    let mut report = Report::begin(seed);
    let mut chance = fastrand::Rng::with_seed(seed);
    for flavour in [Flavour::Redis, Flavour::Redis8, Flavour::Valkey9] {
        soak(flavour, Duration::from_secs_f64(minutes * 20.0), &mut chance, &mut report).await;
    }
    report.end();
}

/// Soaks one kind of server. Both Afterimages offload to one object store.
async fn soak(flavour: Flavour, time: Duration, chance: &mut fastrand::Rng, report: &mut Report) {
    let (s3, mode) = (S3::start().await, Arc::new(AtomicU8::new(S3_ANSWERS)));
    let before = Faulty::before(&s3, {
        let mode = Arc::clone(&mode);
        move |_method, _target| match mode.load(Ordering::Relaxed) {
            S3_REFUSES => Some(S3Fault::Refused),
            S3_HANGS => Some(S3Fault::Hangs),
            _ => None,
        }
    });
    let before = before.await;
    let mut settings = S3::settings(before.port);
    settings.push(("offload.timeout", "1s".to_owned()));
    settings.push(("log.filter", "error".to_owned()));
    let settings: Vec<_> = settings.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let mut world = World::start(flavour, &settings).await;
    let sampler = Sampler::start(report, flavour, &world.process, &world.meter);
    let followed = Followed::start(world.process.address);
    let (begin, put) = (Instant::now(), Arc::default());
    loop {
        let fault = Fault::ALL[chance.usize(..Fault::ALL.len())];
        let s3_mode = [S3_ANSWERS, S3_ANSWERS, S3_REFUSES, S3_HANGS][chance.usize(..4)];
        mode.store(s3_mode, Ordering::Relaxed);
        let (pause, later) = (Duration::from_millis(chance.u64(300..3000)), Arc::clone(&mode));
        let answering = tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            later.store(S3_ANSWERS, Ordering::Relaxed);
        });
        let putting = fault.keeps_writes().then(|| {
            Putting::start(world.here.address, Arc::clone(&world.written), Arc::clone(&put))
        });
        let from = report.elapsed();
        let checked = world.check(fault).await;
        if let Some(putting) = putting {
            putting.end().await;
        }
        answering.await.unwrap();
        report.fault(from, flavour, fault, s3_mode, &checked);
        let wrong = &checked.wrong;
        assert!(wrong.is_empty(), "seed {}, {fault:?}, {flavour:?}: {wrong:#?}", report.seed);
        followed.settle(&world).await;
        if begin.elapsed() >= time {
            break;
        }
    }
    sampler.end().await;
    followed.end();
}

/// A client that writes images over HTTP.
struct Putting {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Putting {
    /// Starts to write. `put_keys` are the images that were written before; they are removed, for a server that loads its data
    /// takes a while for each.
    fn start(address: SocketAddr, written: Written, put_keys: Arc<Mutex<Vec<u64>>>) -> Putting {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            // An image of an earlier fault may have been lost since.
            written.lock().unwrap().retain(|key, _| *key < PUT_KEYS);
            let before = std::mem::take(&mut *put_keys.lock().unwrap());
            for key in before {
                send(address, Method::DELETE, key, Vec::new()).await;
            }
            let (mut key, mut number) = (PUT_KEYS + fastrand::u64(..1 << 40), 0);
            put_keys.lock().unwrap().push(key);
            while !stopped.load(Ordering::Relaxed) {
                number += 1;
                begin_write(&written, key, number);
                if put(address, key, number).await {
                    end_write(&written, key, number);
                } else {
                    // Nobody knows if it was written, or will be.
                    written.lock().unwrap().remove(&key);
                    key += 1;
                    put_keys.lock().unwrap().push(key);
                }
                tokio::time::sleep(Duration::from_millis(fastrand::u64(20..100))).await;
            }
        });
        Putting { stop, task }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

/// Writes an image with a number; true if that was acknowledged.
async fn put(address: SocketAddr, key: u64, number: u64) -> bool {
    let mut image = png(0, 3000);
    image[8..16].copy_from_slice(&number.to_le_bytes());
    send(address, Method::PUT, key, image).await
}

/// Sends a request for an image; true if it was successful.
async fn send(address: SocketAddr, method: Method, key: u64, body: Vec<u8>) -> bool {
    let mut client = Client::connect(address).await;
    let path = format!("/images/k{key}");
    let answer = client.send(method, &path, &[("content-type", "image/png")], body.into()).await;
    answer.is_ok_and(|answer| answer.status.is_success())
}

/// The versions that a stream of events has told last.
struct Followed {
    versions: Arc<Mutex<HashMap<String, String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Followed {
    fn start(address: SocketAddr) -> Followed {
        let versions: Arc<Mutex<HashMap<_, _>>> = Arc::default();
        let told = Arc::clone(&versions);
        let task = tokio::spawn(async move {
            let mut events = Events::of(address, "prefix=k").await;
            loop {
                let event = events.next().await;
                told.lock().unwrap().insert(event.of(), event.id);
            }
        });
        Followed { versions, task }
    }

    /// Waits until the stream has told the version of each image.
    async fn settle(&self, world: &World) {
        for key in keys(&world.written) {
            until("the stream has told the present version", || async {
                let answer = get(world.process.address, &format!("/images/k{key}"), &[]).await;
                let told = self.versions.lock().unwrap().get(&format!("k{key}")).cloned();
                told.is_some_and(|version| answer.header("etag") == format!("\"{version}\""))
            })
            .await;
        }
        assert!(!self.task.is_finished(), "the stream has ended");
    }

    fn end(self) {
        self.task.abort();
    }
}

/// The files that the report is made of.
struct Report {
    seed: u64,
    begin: Instant,
    samples: Arc<Mutex<File>>,
    faults: File,
}

impl Report {
    fn begin(seed: u64) -> Report {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/soak");
        std::fs::create_dir_all(&folder).unwrap();
        let file = |name: &str, columns: &str| {
            let mut file = File::create(folder.join(name)).unwrap();
            writeln!(file, "{columns}").unwrap();
            file
        };
        let samples = file(
            "samples.csv",
            "seconds,server,resident,descriptors,threads,answers,refused,marked,p50,p99,max",
        );
        let faults = file("faults.csv", "seed,from,to,server,fault,s3,answers,latest,bound");
        Report { seed, begin: Instant::now(), samples: Arc::new(Mutex::new(samples)), faults }
    }

    fn elapsed(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    fn fault(&mut self, from: f64, flavour: Flavour, fault: Fault, s3: u8, checked: &Checked) {
        let (seed, to) = (self.seed, self.elapsed());
        let s3 = ["answers", "refuses", "hangs"][usize::from(s3)];
        let (answers, latest) = (checked.answers, checked.latest.as_secs_f64());
        let bound = fault.bound().as_secs_f64();
        writeln!(
            self.faults,
            "{seed},{from:.2},{to:.2},{flavour:?},{fault:?},{s3},{answers},{latest:.4},{bound}"
        )
        .unwrap();
    }

    fn end(self) {
        // Its files are closed first.
        drop(self);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/soak/report.py");
        let made = std::process::Command::new("python3").arg(script).status().unwrap();
        assert!(made.success());
    }
}

/// Samples a process twice a second.
struct Sampler {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Sampler {
    fn start(
        report: &Report,
        flavour: Flavour,
        process: &Process,
        meter: &Arc<Mutex<Meter>>,
    ) -> Sampler {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, meter) = (Arc::clone(&stop), Arc::clone(meter));
        let (begin, samples) = (report.begin, Arc::clone(&report.samples));
        let pid = process.child.id();
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(500));
            while !stopped.load(Ordering::Relaxed) {
                ticks.tick().await;
                let Meter { mut milliseconds, refused, marked } =
                    std::mem::take(&mut *meter.lock().unwrap());
                milliseconds.sort_by(f64::total_cmp);
                let answers = milliseconds.len();
                let at = |share: usize| milliseconds.get(answers * share / 100).copied();
                let [p50, p99] = [at(50), at(99)].map(Option::unwrap_or_default);
                let most = milliseconds.last().copied().unwrap_or_default();
                let seconds = begin.elapsed().as_secs_f64();
                let [resident, descriptors, threads] = figures(pid);
                writeln!(
                    samples.lock().unwrap(),
                    "{seconds:.1},{flavour:?},{resident},{descriptors},{threads},{answers},{refused},{marked},\
                     {p50:.3},{p99:.3},{most:.3}"
                )
                .unwrap();
            }
        });
        Sampler { stop, task }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

/// Resident bytes, open descriptors and threads of a process (proc(5)).
fn figures(pid: u32) -> [u64; 3] {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    [field("VmRSS:") * 1024, descriptors as u64, field("Threads:")]
}
