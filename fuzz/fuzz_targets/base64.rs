#![no_main]

afterimage_fuzz::target!(base64);
