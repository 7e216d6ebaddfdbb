#![no_main]

afterimage_fuzz::target!(h1_head);
