#![no_main]

afterimage_fuzz::target!(redis_pushes);
