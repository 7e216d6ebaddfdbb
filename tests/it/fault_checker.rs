//! The checker of the promise while servers fail: one fault after the other, beside a writer and readers. An answer that
//! isn't marked as stale must not be older than the bound that `docs/coherence.md` states for the fault.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage::{App, Clock, Rules, Suspended};
use redis::aio::MultiplexedConnection;

use crate::coherence::on_every_server;
use crate::harness::redis::free_port;
use crate::harness::server::{load, program};
use crate::harness::{
    Client, Flavour, Held, Process, Proxy, RedisServer, Server, png, record, until,
};
use crate::judge::{History, Seen, Step, judge};

mod long {
    use super::{no_answer_is_older_than_the_bound_of_its_fault, on_every_server};

    on_every_server! {
        no_answer_is_older_than_the_bound_of_its_fault
    }
}

/// Images that a backend writes by SET. Further ones may be written over HTTP.
const KEYS: u64 = 4;

/// Allowance for a machine that suspends a thread of the test itself, and has two cores for five servers.
const ALLOWANCE: Duration = Duration::from_millis(500);

/// The lease: bound on staleness of everything but a switched address.
const LEASE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// The primary becomes a replica without a link; the new primary takes writes, and the address follows later.
    Demotion,
    /// The address leads to the new primary, and no connection to the old one is cut.
    Switch,
    /// The same while the old primary hangs; then it wakes up.
    HungSwitch,
    Freeze,
    Suspension,
    /// Redis hangs.
    Hang,
    /// Every connection is closed by Redis.
    Kill,
    NoAccess,
    NoTracking,
    Loading,
}

impl Fault {
    pub(crate) const ALL: [Fault; 10] = [
        Fault::Demotion,
        Fault::Switch,
        Fault::HungSwitch,
        Fault::Freeze,
        Fault::Suspension,
        Fault::Hang,
        Fault::Kill,
        Fault::NoAccess,
        Fault::NoTracking,
        Fault::Loading,
    ];

    /// True if no server loses a write that it has acknowledged.
    pub(crate) fn keeps_writes(self) -> bool {
        !matches!(self, Fault::Demotion | Fault::Switch | Fault::HungSwitch | Fault::Loading)
    }

    pub(crate) fn bound(self) -> Duration {
        match self {
            Fault::Switch | Fault::HungSwitch => Duration::from_secs(3),
            _ => LEASE,
        }
    }
}

/// The history of all keys, shared with further writers.
pub(crate) type Written = Arc<Mutex<History>>;

/// Readings of the answers since the last sample.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    pub(crate) milliseconds: Vec<f64>,
    pub(crate) refused: u64,
    /// Answers that are marked as possibly outdated.
    pub(crate) marked: u64,
}

/// The answers beside a fault.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    pub(crate) answers: usize,
    /// The longest time between a write and a request that still got the image before it.
    pub(crate) latest: Duration,
    /// Those that were not possible.
    pub(crate) wrong: Vec<String>,
}

/// Two Redis servers behind one address, and two Afterimages: one in this process with a clock that can be put forward, one
/// in a process of its own that can be frozen.
pub(crate) struct World {
    primary: RedisServer,
    other: RedisServer,
    proxy: Proxy,
    pub(crate) here: Server,
    pub(crate) process: Process,
    suspended: &'static Suspended,
    pub(crate) written: Written,
    pub(crate) meter: Arc<Mutex<Meter>>,
    next: u64,
}

async fn no_answer_is_older_than_the_bound_of_its_fault(flavour: Flavour) {
    let seconds = std::env::var("AFTERIMAGE_TEST_FAULTS_SECONDS").ok();
    let seconds = seconds.map_or(0, |it| it.parse().expect("a number of seconds"));
    let begin = Instant::now();
    let mut world = World::start(flavour, &[]).await;
    let mut answers = 0;
    for round in 0.. {
        for fault in Fault::ALL {
            let checked = world.check(fault).await;
            assert!(checked.wrong.is_empty(), "round {round}, {fault:?}: {:#?}", checked.wrong);
            answers += checked.answers;
        }
        if begin.elapsed() >= Duration::from_secs(seconds) {
            break;
        }
    }
    println!("{answers} answers in {:?}", begin.elapsed());
}

async fn run(redis: &RedisServer, command: &[&str]) {
    let mut it = redis::cmd(command[0]);
    it.arg(&command[1..]).exec_async(&mut writer_of(redis).await).await.unwrap();
}

/// A connection of a user whose rights stay.
async fn writer_of(redis: &RedisServer) -> MultiplexedConnection {
    let url = format!("redis://writer:any@127.0.0.1:{}", redis.port);
    let config =
        redis::AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(30)));
    let client = redis::Client::open(url).unwrap();
    client.get_multiplexed_async_connection_with_config(&config).await.unwrap()
}

async fn pause(from: u64, to: u64) {
    tokio::time::sleep(Duration::from_millis(fastrand::u64(from..to))).await;
}

impl World {
    /// Starts the servers, with further settings of both Afterimages.
    pub(crate) async fn start(flavour: Flavour, further: &[(&str, &str)]) -> World {
        let user = ["--user", "writer", "on", "nopass", "~*", "&*", "+@all"];
        let primary = RedisServer::start_flavour(flavour, &user).await;
        let other = RedisServer::start_flavour(flavour, &user).await;
        let proxy = Proxy::to(primary.port).await;
        let url = format!("redis://{}", proxy.address);
        let suspended: &'static Suspended = Box::leak(Box::default());
        let clock = Clock::suspendable(suspended);
        let mut all = vec![("redis.url", url.as_str()), ("log.access", "false")];
        all.extend_from_slice(further);
        let settings = load(&all);
        let app = App::build_for_test(settings, Rules::default(), clock).await.unwrap();
        let here = Server::serve(app).coherent().await;
        let mut command = program();
        for (key, value) in all {
            command.arg(format!("--{}", key.replace(['.', '_'], "-"))).arg(value);
        }
        let process = Process::start(command);
        let (written, meter) = (Written::default(), Arc::default());
        World { primary, other, proxy, here, process, suspended, written, meter, next: 1 }
    }

    fn servers(&self) -> [(&'static str, SocketAddr); 2] {
        [("the server in this process", self.here.address), ("the program", self.process.address)]
    }

    /// Injects a fault beside a writer and readers, and judges the answers.
    pub(crate) async fn check(&mut self, fault: Fault) -> Checked {
        self.other_follows().await;
        self.write_all().await;
        self.settle().await;
        let stop = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..6)
            .map(|reader| {
                let (server, address) = self.servers()[reader % 2];
                let (written, meter) = (Arc::clone(&self.written), Arc::clone(&self.meter));
                tokio::spawn(read(server, address, written, meter, Arc::clone(&stop)))
            })
            .collect();
        self.inject(fault).await;
        self.settle().await;
        stop.store(true, Ordering::SeqCst);
        let mut checked = Checked::default();
        for reader in readers {
            let seen = reader.await.unwrap();
            let verdict = judge(&self.written.lock().unwrap(), &seen, fault.bound() + ALLOWANCE);
            checked.answers += seen.len();
            checked.latest = checked.latest.max(verdict.latest);
            checked.wrong.extend(verdict.wrong);
        }
        checked
    }

    async fn inject(&mut self, fault: Fault) {
        match fault {
            Fault::Demotion => {
                run(&self.other, &["REPLICAOF", "NO", "ONE"]).await;
                run(&self.primary, &["REPLICAOF", "127.0.0.1", &free_port().to_string()]).await;
                std::mem::swap(&mut self.primary, &mut self.other);
                self.write_for(1000).await;
                self.proxy.lead_to(self.primary.port);
                self.write_for(500).await;
            }
            Fault::Switch => {
                run(&self.other, &["REPLICAOF", "NO", "ONE"]).await;
                std::mem::swap(&mut self.primary, &mut self.other);
                self.proxy.lead_to(self.primary.port);
                self.write_for(4500).await;
            }
            Fault::HungSwitch => {
                run(&self.other, &["REPLICAOF", "NO", "ONE"]).await;
                self.primary.signal("STOP");
                std::mem::swap(&mut self.primary, &mut self.other);
                self.proxy.lead_to(self.primary.port);
                self.write_for(fastrand::u64(300..2000)).await;
                self.other.signal("CONT");
                self.write_for(4000).await;
            }
            Fault::Freeze => {
                for _ in 0..4 {
                    self.process.signal("STOP");
                    self.write_for(fastrand::u64(200..1500)).await;
                    self.process.signal("CONT");
                    self.write_for(300).await;
                }
            }
            Fault::Suspension => {
                for _ in 0..4 {
                    self.proxy.hold(Held::Tracking);
                    self.write_all().await;
                    self.suspended.add(Duration::from_secs(fastrand::u64(1..100)));
                    self.write_for(300).await;
                    self.proxy.hold(Held::None);
                    self.write_for(300).await;
                }
            }
            Fault::Hang => {
                for _ in 0..3 {
                    self.primary.signal("STOP");
                    pause(100, 1500).await;
                    self.primary.signal("CONT");
                    self.write_for(300).await;
                }
            }
            Fault::Kill => {
                for _ in 0..10 {
                    run(&self.primary, &["CLIENT", "KILL", "USER", "default"]).await;
                    self.write_for(150).await;
                }
            }
            Fault::NoAccess => {
                run(&self.primary, &["ACL", "SETUSER", "default", "resetkeys", "~other:*"]).await;
                self.write_for(1500).await;
                run(&self.primary, &["ACL", "SETUSER", "default", "~*"]).await;
                self.write_for(300).await;
            }
            Fault::NoTracking => {
                run(&self.primary, &["ACL", "SETUSER", "default", "-client|tracking"]).await;
                run(&self.primary, &["CLIENT", "KILL", "USER", "default"]).await;
                self.write_for(1500).await;
                run(&self.primary, &["ACL", "SETUSER", "default", "+client|tracking"]).await;
                self.write_for(300).await;
            }
            Fault::Loading => {
                run(&self.primary, &["SAVE"]).await;
                self.primary.kill();
                self.primary.restart_loading(&[
                    "--key-load-delay",
                    "300000",
                    "--loading-process-events-interval-bytes",
                    "1024",
                ]);
                pause(500, 1000).await;
                until("it has loaded", || async { self.primary.answers().await }).await;
                self.write_for(300).await;
            }
        }
    }

    /// Makes the other server a replica that has everything, with the rights that users had at first.
    async fn other_follows(&mut self) {
        let port = self.primary.port.to_string();
        run(&self.other, &["REPLICAOF", "127.0.0.1", &port]).await;
        until("the replica is in step", || async {
            let mut info = redis::cmd("INFO");
            let mut connection = writer_of(&self.other).await;
            let text: String = info.arg("replication").query_async(&mut connection).await.unwrap();
            text.contains("master_link_status:up")
        })
        .await;
    }

    /// Writes to random keys for a while.
    async fn write_for(&mut self, milliseconds: u64) {
        let end = Instant::now() + Duration::from_millis(milliseconds);
        let mut connection = writer_of(&self.primary).await;
        while Instant::now() < end {
            self.write(&mut connection, fastrand::u64(0..KEYS)).await;
            pause(2, 30).await;
        }
    }

    async fn write_all(&mut self) {
        let mut connection = writer_of(&self.primary).await;
        for key in 0..KEYS {
            self.write(&mut connection, key).await;
        }
    }

    async fn write(&mut self, connection: &mut MultiplexedConnection, key: u64) {
        self.next += 1;
        let number = self.next;
        let mut set = redis::cmd("SET");
        let mut image = png(0, 3000);
        image[8..16].copy_from_slice(&number.to_le_bytes());
        set.arg(format!("image:k{key}")).arg(record(&image));
        begin_write(&self.written, key, number);
        set.exec_async(connection).await.unwrap();
        end_write(&self.written, key, number);
    }

    /// Waits until both servers serve the last state of every key from memory, as current.
    async fn settle(&self) {
        for (_, address) in self.servers() {
            for key in keys(&self.written) {
                until("the last state is served from memory", || async {
                    let answer =
                        crate::harness::get(address, &format!("/images/k{key}"), &[]).await;
                    // Another writer may have gone on, or may have given up the image.
                    let written = self.written.lock().unwrap();
                    written.get(&key).is_none_or(|steps| {
                        answer.header("cache-status") == "afterimage; hit"
                            && number_in(&answer.body) >= steps.last().unwrap().number
                    })
                })
                .await;
            }
        }
    }
}

/// The images that are read.
pub(crate) fn keys(written: &Written) -> Vec<u64> {
    written.lock().unwrap().keys().copied().collect()
}

/// Notes that a write is sent.
pub(crate) fn begin_write(written: &Written, key: u64, number: u64) {
    let step = Step { number, from: Instant::now(), to: None };
    written.lock().unwrap().entry(key).or_default().push(step);
}

/// Notes that a write was acknowledged.
pub(crate) fn end_write(written: &Written, key: u64, number: u64) {
    let mut written = written.lock().unwrap();
    let step = written.get_mut(&key).and_then(|steps| steps.last_mut());
    let step = step.filter(|step| step.number == number).expect("it was begun");
    step.to = Some(Instant::now());
}

fn number_in(body: &[u8]) -> u64 {
    u64::from_le_bytes(body[8..16].try_into().unwrap())
}

/// Reads until it is told to stop. Answers that are marked as stale, and refusals, are left out.
async fn read(
    source: &'static str,
    address: SocketAddr,
    written: Written,
    meter: Arc<Mutex<Meter>>,
    stop: Arc<AtomicBool>,
) -> Vec<Seen> {
    let mut client = Client::connect(address).await;
    let mut all: Vec<Seen> = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let key = fastrand::choice(keys(&written)).unwrap();
        let (asked, before) = (Instant::now(), all.len());
        let answer = client.get(&format!("/images/k{key}"), &[]).await;
        let is_marked = answer.header("cache-status").contains("detail=store-unreachable");
        {
            let mut meter = meter.lock().unwrap();
            meter.milliseconds.push(asked.elapsed().as_secs_f64() * 1000.0);
            meter.refused += u64::from(answer.status != 200);
            meter.marked += u64::from(is_marked);
        }
        if answer.status == 200 && !is_marked {
            let (number, answered) = (number_in(&answer.body), Instant::now());
            all.push(Seen { source, key, number, asked, answered, before });
        }
        pause(1, 5).await;
    }
    all
}
