//! Fuzz targets: each takes any bytes, gives them to a parser, and panics if that breaks a promise.
//!
//! Unit tests run each for a moment, beginning with the seeds in `fuzz/seeds/`; the soak runs each for long. `fuzz/` is their
//! package for cargo fuzz.

mod http;
mod pictures;
mod records;
mod requests;
mod settings;
#[cfg(test)]
mod tests;

pub use self::http::{
    conditional, digests, events, forwarded, host, image_ids, negotiation, parameters, range,
};
pub use self::pictures::{avif, bmp, gif, ico, jpeg, jxl, png, tiff, webp};
pub use self::records::{base64, record, sniffing, strip};
pub use self::requests::{h1_head, proxy_protocol};
pub use self::settings::{command_line, environment, settings_file};
pub use crate::store::fuzzing::{redis_pushes, redis_replies};

/// A target and its name.
pub type Target = (&'static str, fn(&[u8]));

/// Lists targets by name, and has a test for each.
macro_rules! targets {
    ($($name:ident)*) => {
        /// All targets.
        pub const TARGETS: &[Target] = &[$((stringify!($name), $name)),*];

        #[cfg(test)]
        mod each {
            $(
                #[test]
                fn $name() {
                    super::tests::run(stringify!($name), super::$name);
                }
            )*
        }
    };
}

targets! {
    record base64 sniffing strip
    h1_head proxy_protocol
    conditional range negotiation digests image_ids parameters forwarded host events
    redis_replies redis_pushes
    png jpeg gif webp bmp ico tiff avif jxl
    settings_file environment command_line
}
