//! `SIGHUP`: reads the settings again, and takes over those that can change while the server runs.

use std::num::NonZeroUsize;
use std::sync::Arc;

use sd_notify::NotifyState;
use tokio::signal::unix::Signal;

use super::{LoadedSettings, SettingsSource};
use crate::app::App;
use crate::log::Log;
use crate::settings::Settings;

/// The beginnings of the keys that a reload takes over. Certificates are read again from the same files.
const RELOADABLE: [&str; 3] = ["limits.", "log.filter", "writes.tokens"];

/// Reloads the settings of a running server.
pub(super) struct Reloader {
    pub(super) source: SettingsSource,
    pub(super) app: Arc<App>,
    pub(super) log: Log,
    /// The settings that hold now, by section and name.
    pub(super) table: toml::Table,
    /// Returns the connections that the limit on open files leaves room for.
    pub(super) fit: fn(&Settings) -> NonZeroUsize,
}

impl Reloader {
    /// Reloads at each signal, until the runtime ends.
    pub(super) async fn run(mut self, mut hangup: Signal) {
        while hangup.recv().await.is_some() {
            if self.app.shutdown.is_stopping() {
                continue;
            }
            if let Ok(now) = NotifyState::monotonic_usec_now() {
                let _ = sd_notify::notify(&[NotifyState::Reloading, now]);
            }
            if let Err(error) = self.reload() {
                let error = super::describe(&error);
                tracing::error!(error, "not reloaded: the settings before stay");
            }
            let _ = sd_notify::notify(&[NotifyState::Ready]);
        }
    }

    fn reload(&mut self) -> anyhow::Result<()> {
        let LoadedSettings { mut settings, table } = self.source.load()?;
        // First, since only these can fail: a reload is whole, or nothing of it.
        self.app.tokens.reload(&settings.writes)?;
        self.log.set_filter(&settings.log.filter)?;
        settings.limits.connections = (self.fit)(&settings);
        self.app.set_limits(&settings.limits);
        self.app.reloaded.notify_one();

        let changed = changed(&self.table, &table);
        let is_reloadable = |key: &String| RELOADABLE.iter().any(|it| key.starts_with(it));
        let (taken, left): (Vec<_>, Vec<_>) = changed.into_iter().partition(is_reloadable);
        tracing::info!(changed = taken.join(", "), "settings reloaded");
        if !left.is_empty() {
            tracing::warn!(settings = left.join(", "), "changed settings that need a restart");
        }
        for key in taken {
            copy(&key, &table, &mut self.table);
        }
        Ok(())
    }
}

/// The keys of the settings that differ.
fn changed(before: &toml::Table, after: &toml::Table) -> Vec<String> {
    let mut changed = Vec::new();
    for (section, settings) in after {
        for (name, value) in settings.as_table().into_iter().flatten() {
            if before.get(section).and_then(|it| it.get(name)) != Some(value) {
                changed.push(format!("{section}.{name}"));
            }
        }
    }
    changed
}

/// Copies a setting from one table to another.
fn copy(key: &str, from: &toml::Table, to: &mut toml::Table) {
    let Some((section, name)) = key.split_once('.') else { return };
    let value = from.get(section).and_then(|it| it.get(name));
    let slot = to.get_mut(section).and_then(|it| it.get_mut(name));
    if let (Some(value), Some(slot)) = (value, slot) {
        *slot = value.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_settings_are_told_by_their_keys() {
        let table = |text: &str| toml::from_str::<toml::Table>(text).unwrap();
        let mut before = table("[limits]\nrenders = 64\n[http]\nlisten = 'a'\nmax_age = '1h'");
        let after = table("[limits]\nrenders = 5\n[http]\nlisten = 'b'\nmax_age = '1h'");
        assert_eq!(changed(&before, &after), ["http.listen", "limits.renders"]);
        copy("limits.renders", &after, &mut before);
        assert_eq!(changed(&before, &after), ["http.listen"]);
    }
}
