#![no_main]

afterimage_fuzz::target!(command_line);
