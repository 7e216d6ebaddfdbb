//! Flights: leaders that leave, followers that come late, work that is given up, and work that panics.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::future::block_on;

use super::{Reached, explore};
use crate::coalesce::{Flights, Interest, Lost};
use crate::sync::{WantedPanic, spawn, yield_now};

/// The key of a piece of work, and its number in the order of their beginnings; `None` if it was given up.
type Outcome = (usize, Option<usize>);

/// Flights, and the work of theirs that runs.
#[derive(Default)]
struct World {
    flights: Arc<Flights<usize, Outcome>>,
    running: [AtomicUsize; 2],
    begun: AtomicUsize,
    reached: Reached,
}

/// Work of a key that runs until this is dropped.
struct Running(Arc<World>, usize);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running[self.1].fetch_sub(1, Ordering::Relaxed);
    }
}

/// Ways in which work may end.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Outcome,
    Panic,
    /// It gives up as soon as nobody waits.
    GivenUp,
}

impl World {
    fn new(reached: &Reached) -> Arc<World> {
        Arc::new(World { reached: reached.clone(), ..World::default() })
    }

    async fn work(
        self: Arc<Self>,
        key: usize,
        end: End,
        interest: Interest<usize, Outcome>,
    ) -> Outcome {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let others = self.running[key].fetch_add(1, Ordering::Relaxed);
        assert_eq!(others, 0, "two pieces of work run for one key");
        let running = Running(Arc::clone(&self), key);
        for _ in 0..2 {
            yield_now().await;
            if end == End::GivenUp && interest.give_up_if_unwanted() {
                self.reached.note("given up");
                drop(running);
                yield_now().await;
                return (key, None);
            }
        }
        if end == End::Panic {
            std::panic::resume_unwind(Box::new(WantedPanic));
        }
        (key, Some(number))
    }

    /// Joins or begins the work of a key, and waits for its outcome.
    async fn ask(self: &Arc<Self>, key: usize, end: End) -> Result<usize, Lost> {
        let work = |interest| Arc::clone(self).work(key, end, interest);
        let (flight, joined) = self.flights.join(key, work);
        if joined {
            self.reached.note("joined");
        }
        let (of, number) = flight.outcome().await?;
        assert_eq!(of, key, "the outcome of another key");
        Ok(number.expect("the outcome of work that was given up"))
    }

    /// Waits until all work has ended. Otherwise the exploration fails: a schedule may have so many steps and no more.
    async fn until_all_has_ended(&self) {
        while !self.flights.is_empty() {
            yield_now().await;
        }
        assert!(self.running.iter().all(|it| it.load(Ordering::Relaxed) == 0));
    }
}

#[test]
fn a_leader_leaves_and_its_followers_land() {
    explore(
        "a leader leaves and its followers land",
        800,
        &["joined", "the leader left"],
        |reached| {
            let world = World::new(reached);
            block_on(async move {
                let ask = |key| {
                    let world = Arc::clone(&world);
                    spawn(async move { world.ask(key, End::Outcome).await })
                };
                let (leader, others) = (ask(0), [ask(0), ask(0), ask(1)]);
                yield_now().await;
                leader.abort();
                if leader.await.is_err() {
                    world.reached.note("the leader left");
                }
                for other in others {
                    assert!(matches!(other.await, Ok(Some(Ok(_)))));
                }
                world.until_all_has_ended().await;
            });
        },
    );
}

#[test]
fn an_outcome_is_for_those_who_came_before_it() {
    explore("an outcome is for those who came before it", 800, &["joined"], |reached| {
        let world = World::new(reached);
        block_on(async move {
            let askers = [0, 0, 0].map(|key| {
                let world = Arc::clone(&world);
                spawn(async move {
                    let first = world.ask(key, End::Outcome).await.unwrap();
                    let second = world.ask(key, End::Outcome).await.unwrap();
                    assert!(second > first, "a retry gets the outcome that it had");
                })
            });
            for asker in askers {
                asker.await.unwrap();
            }
            world.until_all_has_ended().await;
        });
    });
}

#[test]
fn work_that_is_given_up_is_joined_by_nobody() {
    let situations = ["joined", "given up"];
    explore("work that is given up is joined by nobody", 1200, &situations, |reached| {
        let world = World::new(reached);
        block_on(async move {
            let leaver = {
                let world = Arc::clone(&world);
                spawn(async move {
                    let work = |interest| Arc::clone(&world).work(0, End::GivenUp, interest);
                    let (flight, _) = world.flights.join(0, work);
                    yield_now().await;
                    drop(flight);
                })
            };
            let askers = [0, 1, 2].map(|pauses| {
                let world = Arc::clone(&world);
                spawn(async move {
                    for _ in 0..pauses {
                        yield_now().await;
                    }
                    world.ask(0, End::GivenUp).await.unwrap()
                })
            });
            leaver.await.unwrap();
            for asker in askers {
                asker.await.unwrap();
            }
            world.until_all_has_ended().await;
        });
    });
}

#[test]
fn a_panic_of_the_work_leaves_nobody_waiting() {
    let situations = ["joined", "lost"];
    explore("a panic of the work leaves nobody waiting", 800, &situations, |reached| {
        let world = World::new(reached);
        block_on(async move {
            let askers = [(0, End::Panic), (0, End::Panic), (1, End::Outcome), (0, End::Panic)];
            let askers = askers.map(|(key, end)| {
                let world = Arc::clone(&world);
                spawn(async move {
                    let outcome = world.ask(key, end).await;
                    assert_eq!(outcome.is_err(), end == End::Panic);
                    if outcome.is_err() {
                        world.reached.note("lost");
                    }
                })
            });
            for asker in askers {
                asker.await.unwrap();
            }
            world.until_all_has_ended().await;
        });
    });
}
