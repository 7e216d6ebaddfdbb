#![no_main]

afterimage_fuzz::target!(settings_file);
