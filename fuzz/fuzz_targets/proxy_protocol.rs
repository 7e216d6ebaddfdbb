#![no_main]

afterimage_fuzz::target!(proxy_protocol);
