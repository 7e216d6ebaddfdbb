#![no_main]

afterimage_fuzz::target!(image_ids);
