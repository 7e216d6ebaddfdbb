//! Common code of the fuzz targets of cargo fuzz.

/// Runs a target of `afterimage::fuzzing` by libFuzzer.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(
            // libFuzzer's hook aborts at each panic, also where a decoder's is caught and its picture refused. One that isn't
            // caught aborts without it.
            init: drop(std::panic::take_hook()),
            |data: &[u8]| afterimage::fuzzing::$name(data)
        );
    };
}
