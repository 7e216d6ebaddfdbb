//! The coherence checker: writers and readers run side by side, and a history tells which responses were possible.
//!
//! Every value carries a number. One writer issues operations one after the other and records, for each key, the new
//! state and the interval in which it took effect (`judge.rs`). No answer may be older than `BOUND`, or than what its reader has
//! seen before. After each burst both servers must settle on the last state, so an entry that is stale for ever is found.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use afterimage::{App, Clock, Rule, Rules};
use redis::aio::MultiplexedConnection;

use crate::coherence::on_every_server;
use crate::harness::server::load;
use crate::harness::{Answer, Client, Flavour, RedisServer, Server, png, record, until};
use crate::judge::{History, Seen, Step, judge};

/// Largest allowed staleness. The contract allows one push, well under a millisecond, but the test machine may suspend a
/// thread for longer.
const BOUND: Duration = Duration::from_millis(250);

/// Staleness from which an entry counts as stale for ever.
const FOR_EVER: Duration = Duration::from_secs(3);

const KEYS: u64 = 6;

on_every_server! {
    races_of_a_write_and_a_read_leave_nothing_stale
    no_response_is_older_than_the_bound_under_concurrent_changes
}

async fn races_of_a_write_and_a_read_leave_nothing_stale(flavour: Flavour) {
    // Every order of events is explored in `src/index/explore.rs`; here the servers are real.
    let rounds = std::env::var("AFTERIMAGE_TEST_RACES").ok();
    let rounds = rounds.map_or(250, |it| it.parse().expect("a number of rounds"));
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let stale = races(&redis, Rules::default(), rounds).await;
    assert_eq!(stale, 0);
}

async fn no_response_is_older_than_the_bound_under_concurrent_changes(flavour: Flavour) {
    // The simulation judges many more histories; here the servers are real.
    let histories = std::env::var("AFTERIMAGE_TEST_HISTORIES").ok();
    let histories = histories.map_or(1, |it| it.parse().expect("a number of histories"));
    for seed in 1..=histories {
        let redis = RedisServer::start_flavour(flavour, &[]).await;
        let wrong = check(&redis, Rules::default(), seed, 12).await;
        assert!(wrong.is_empty(), "seed {seed}: {wrong:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_races_detect_a_disabled_guard() {
    let redis = RedisServer::start().await;
    let stale = races(&redis, unguarded(), 300).await;
    println!("{stale} of 300 races left a stale image without the guard");
    assert!(stale > 0);
}

/// The auditor of a server without the guard finds what the races found; with the guard it compares and finds nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_auditor_detects_a_disabled_guard() {
    let redis = RedisServer::start().await;
    for (rules, rounds) in [(Rules::default(), 100), (unguarded(), 300)] {
        let servers = two_servers_with(&redis, rules, &[("audit.interval", "100ms")]).await;
        let stale = races_on(&servers, &redis, rules, rounds).await;
        let total = async |name| servers[0].metric(name).await + servers[1].metric(name).await;
        if rules == Rules::default() {
            until("entries are compared", || async {
                total("afterimage_audit_checked_total").await >= 10
            })
            .await;
            assert_eq!((stale, total("afterimage_audit_stale_total").await), (0, 0));
        } else {
            until("the auditor finds them", || async {
                total("afterimage_audit_stale_total").await > 0
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_checker_detects_a_disabled_guard() {
    let redis = RedisServer::start().await;
    let wrong = check(&redis, unguarded(), 1, 12).await;
    println!("{} answers were wrong without the guard, such as {:?}", wrong.len(), wrong.first());
    assert!(!wrong.is_empty());
}

/// All rules but the guard: a push doesn't invalidate the fetch under way.
fn unguarded() -> Rules {
    Rules::without(Rule::PushInvalidatesFetch)
}

/// A small pseudo-random generator with a fixed seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// Yields to the runtime for a random time up to a limit. Timers are too coarse for microseconds.
    async fn pause(&mut self, microseconds: u64) {
        let end = Instant::now() + Duration::from_micros(self.below(microseconds));
        while Instant::now() < end {
            tokio::task::yield_now().await;
        }
    }
}

/// A record whose image carries a number, large enough for its reply to take longer than a push.
fn value(number: u64) -> Vec<u8> {
    let mut bytes = png(number, 150_000);
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    record(&bytes)
}

/// Returns the number of the image in a response; 0 for 404.
fn number(answer: &Answer) -> u64 {
    match answer.status.as_u16() {
        200 => u64::from_le_bytes(answer.body[8..16].try_into().unwrap()),
        404 => 0,
        _ => panic!("{answer:?}"),
    }
}

async fn two_servers(redis: &RedisServer, rules: Rules) -> [Server; 2] {
    two_servers_with(redis, rules, &[]).await
}

async fn two_servers_with(
    redis: &RedisServer,
    rules: Rules,
    further: &[(&str, &str)],
) -> [Server; 2] {
    let url = redis.url();
    let mut settings = vec![("redis.url", url.as_str())];
    settings.extend_from_slice(further);
    let settings = load(&settings);
    let start = async || {
        let app = App::build_for_test(settings.clone(), rules, Clock::default()).await.unwrap();
        Server::serve(app).coherent().await
    };
    [start().await, start().await]
}

/// Races a write with a read on each of two servers, and counts the rounds after which one of them never serves the
/// new version.
async fn races(redis: &RedisServer, rules: Rules, rounds: u64) -> u64 {
    races_on(&two_servers(redis, rules).await, redis, rules, rounds).await
}

async fn races_on(servers: &[Server; 2], redis: &RedisServer, rules: Rules, rounds: u64) -> u64 {
    let mut writer = redis.connect().await;
    let mut stale = 0;
    let mut clients = Vec::new();
    for server in servers {
        clients.push((Client::connect(server.address).await, Random(7 + clients.len() as u64)));
    }
    let mut random = Random(42);
    for round in 1..=rounds {
        // Without the guard each round has its own key, since a stale entry would stay.
        let path = format!("/images/k{}", if rules == Rules::default() { 0 } else { round });
        let key = path.replace("/images/", "image:");
        let set = |number| {
            let mut set = redis::cmd("SET");
            set.arg(&key).arg(value(number));
            set
        };
        if rules == unguarded() {
            set(1_000_000 + round).exec_async(&mut writer).await.unwrap();
        }
        let new = set(round);
        let write = async {
            random.pause(400).await;
            new.exec_async(&mut writer).await.unwrap();
        };
        let mut reads = Vec::new();
        for (mut client, mut random) in clients.drain(..) {
            let path = path.clone();
            reads.push(tokio::spawn(async move {
                random.pause(400).await;
                client.get(&path, &[]).await;
                (client, random)
            }));
        }
        write.await;
        let written = Instant::now();
        for read in reads {
            clients.push(read.await.unwrap());
        }
        let mut late = false;
        for (client, _) in &mut clients {
            while number(&client.get(&path, &[]).await) != round && !late {
                late = written.elapsed() > FOR_EVER;
                tokio::task::yield_now().await;
            }
        }
        stale += u64::from(late);
        // Three are enough to show that stale entries are found.
        if stale >= 3 {
            break;
        }
    }
    stale
}

/// Runs bursts of writes beside readers on two servers, and returns the responses that were not possible.
async fn check(redis: &RedisServer, rules: Rules, seed: u64, bursts: usize) -> Vec<String> {
    let servers = two_servers(redis, rules).await;
    let start = Instant::now();
    let absent = Step { number: 0, from: start, to: Some(start) };
    let history: History = (0..KEYS).map(|key| (key, vec![absent])).collect();
    let mut writer = Writer {
        connection: redis.connect().await,
        history,
        random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
        next: 1,
        expiring: HashMap::new(),
    };
    let mut wrong = Vec::new();
    for _ in 0..bursts {
        let stop = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..6)
            .map(|reader| {
                let address = servers[reader % 2].address;
                let (stop, random) = (Arc::clone(&stop), Random(seed + 100 + reader as u64));
                tokio::spawn(read(address, random, stop))
            })
            .collect();
        for _ in 0..60 {
            writer.step().await;
            writer.random.pause(4000).await;
        }
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            let answers = reader.await.unwrap();
            wrong.append(&mut judge(&writer.history, &answers, BOUND).wrong);
        }
        wrong.extend(settle(&servers, &mut writer).await);
        if !wrong.is_empty() {
            break;
        }
    }
    wrong
}

/// Waits until both servers serve the last state of every key, and returns the keys that don't settle.
async fn settle(servers: &[Server; 2], writer: &mut Writer) -> Vec<String> {
    let deadline = Instant::now() + FOR_EVER;
    let mut wrong = Vec::new();
    for server in servers {
        let mut client = Client::connect(server.address).await;
        for key in 0..KEYS {
            loop {
                let found = number(&client.get(&format!("/images/k{key}"), &[]).await);
                let last = writer.history[&key].last().copied().unwrap();
                if found == last.number && last.to <= Some(Instant::now()) {
                    break;
                }
                if Instant::now() > deadline {
                    wrong.push(format!("k{key} stays at {found}, the last state is {last:?}"));
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
    }
    wrong
}

async fn read(
    address: std::net::SocketAddr,
    mut random: Random,
    stop: Arc<AtomicBool>,
) -> Vec<Seen> {
    let mut client = Client::connect(address).await;
    let mut seen = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let key = random.below(KEYS);
        let (asked, before) = (Instant::now(), seen.len());
        let number = number(&client.get(&format!("/images/k{key}"), &[]).await);
        let answered = Instant::now();
        seen.push(Seen { source: "a server", key, number, asked, answered, before });
        random.pause(1500).await;
    }
    seen
}

/// Issues one operation after the other, and records each in the history.
struct Writer {
    connection: MultiplexedConnection,
    history: History,
    random: Random,
    next: u64,
    /// Keys with an expiry still to come, and the interval in which it takes effect.
    expiring: HashMap<u64, (Instant, Instant)>,
}

impl Writer {
    async fn step(&mut self) {
        let key = self.random.below(KEYS);
        let name = format!("image:k{key}");
        let from = Instant::now();
        match self.random.below(20) {
            0..=11 => {
                let number = self.number();
                self.run(redis::cmd("SET").arg(&name).arg(value(number))).await;
                self.note(key, from, number);
            }
            12..=14 => {
                let number = self.number();
                let life = 5 + self.random.below(60);
                let mut set = redis::cmd("SET");
                self.run(set.arg(&name).arg(value(number)).arg("PX").arg(life)).await;
                self.note(key, from, number);
                // Two milliseconds more for two clocks and for rounding in Redis.
                let life = Duration::from_millis(life);
                let gone = (from + life, Instant::now() + life + Duration::from_millis(2));
                self.push(key, Step { number: 0, from: gone.0, to: Some(gone.1) });
                self.expiring.insert(key, gone);
            }
            15..=17 => {
                self.run(redis::cmd("DEL").arg(&name)).await;
                self.note(key, from, 0);
            }
            18 => {
                // Written under another name, then renamed to this key.
                let number = self.number();
                self.run(redis::cmd("SET").arg("other").arg(value(number))).await;
                let from = Instant::now();
                self.run(redis::cmd("RENAME").arg("other").arg(&name)).await;
                self.note(key, from, number);
            }
            _ => {
                self.run(&mut redis::cmd("FLUSHALL")).await;
                for key in 0..KEYS {
                    self.note(key, from, 0);
                }
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    async fn run(&mut self, command: &mut redis::Cmd) {
        command.exec_async(&mut self.connection).await.unwrap();
    }

    /// Records the state after an operation that began at `from`. It cancels an expiry that is still to come.
    fn note(&mut self, key: u64, from: Instant, number: u64) {
        let to = Instant::now();
        if let Some((gone, _)) = self.expiring.remove(&key)
            && gone > to
        {
            self.history.get_mut(&key).unwrap().pop();
        }
        self.push(key, Step { number, from, to: Some(to) });
    }

    fn push(&mut self, key: u64, step: Step) {
        self.history.get_mut(&key).unwrap().push(step);
    }
}
