//! Variants: sizes, formats and qualities of an image, thumbnails, info, and placeholders.

use std::io::Cursor;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use image::codecs::gif::GifEncoder;
use image::codecs::webp::WebPDecoder;
use image::{AnimationDecoder, DynamicImage, Frame, ImageDecoder, ImageFormat, Rgb, RgbImage};

use crate::conditional::drawing;
use crate::harness::{Answer, Client, Protocol, RedisServer, Server, etag, get, record, until};
use crate::strangers::connect_from;

long_tests! {
    #[tokio::test(flavor = "multi_thread")] five_hundred_requests_for_twenty_variants_cost_twenty_renders
}

/// A picture with a gradient, so that every corner differs.
pub(crate) fn picture(seed: u8, width: u32, height: u32) -> DynamicImage {
    let shade = |it: u32, most: u32| u8::try_from(255 * it / most).unwrap();
    DynamicImage::ImageRgb8(RgbImage::from_fn(width, height, |x, y| {
        Rgb([shade(x, width), shade(y, height), seed])
    }))
}

pub(crate) fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A GIF of two frames.
pub(crate) fn animation() -> Vec<u8> {
    let mut moving = Vec::new();
    let mut encoder = GifEncoder::new(&mut moving);
    for seed in [1, 200] {
        encoder.encode_frame(Frame::new(picture(seed, 100, 50).into_rgba8())).unwrap();
    }
    drop(encoder);
    moving
}

fn decoded(answer: &Answer) -> DynamicImage {
    assert_eq!(answer.status, StatusCode::OK, "{:?} {:?}", answer.headers, answer.body);
    let format = ImageFormat::from_mime_type(answer.header("content-type")).unwrap();
    image::load_from_memory_with_format(&answer.body, format).unwrap()
}

fn size(answer: &Answer) -> (u32, u32) {
    let picture = decoded(answer);
    (picture.width(), picture.height())
}

async fn accepting(server: &Server, path: &str, accept: &str) -> Answer {
    get(server.address, path, &[("accept", accept)]).await
}

#[tokio::test]
async fn a_variant_has_the_requested_size_and_format_and_its_own_etag() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let value = record(&encoded(&picture(1, 400, 200), ImageFormat::Png));
    redis.set("a", &value).await;
    let version = etag(&value).trim_matches('"').to_owned();
    for (address, media_type, dimensions) in [
        ("a?w=128", "image/png", (128, 64)),
        ("a?h=64", "image/png", (128, 64)),
        ("a?w=128&h=128&fit=cover", "image/png", (128, 128)),
        ("a?w=128&h=128&fit=fill", "image/png", (128, 128)),
        ("a?w=128&h=128", "image/png", (128, 64)),
        ("a?w=128&dpr=2", "image/png", (256, 128)),
        // Images are never enlarged.
        ("a?w=1920", "image/png", (400, 200)),
        ("a.webp", "image/webp", (400, 200)),
        ("a.jpg?w=128&q=50", "image/jpeg", (128, 64)),
        ("a.png", "image/png", (400, 200)),
        ("a?format=webp&w=64", "image/webp", (64, 32)),
        ("a?format=jpg&q=95", "image/jpeg", (400, 200)),
        ("a/thumbnail", "image/webp", (64, 64)),
    ] {
        let path = format!("/images/{address}");
        let answer = server.get(&path).await;
        assert_eq!(answer.header("content-type"), media_type, "{address}");
        assert_eq!(size(&answer), dimensions, "{address}");
        assert_eq!(answer.header("cache-control"), "public, max-age=3600, immutable");
        let tag = answer.header("etag").to_owned();
        // The image's own format in its own size is the original.
        let original = address == "a.png";
        assert_eq!(tag == format!("\"{version}\""), original, "{address}: {tag}");
        assert!(tag.contains(&version), "{tag}");

        let mut client = Client::connect(server.address).await;
        let again = client.get(&path, &[]).await;
        assert_eq!(again.header("cache-status"), "afterimage; hit");
        assert_eq!(again.body, answer.body);
        let head = client.send(Method::HEAD, &path, &[], Bytes::new()).await.unwrap();
        for name in ["content-length", "content-type", "etag"] {
            assert_eq!(head.header(name), answer.header(name), "{name} of {address}");
        }
        let known = client.get(&path, &[("if-none-match", &tag)]).await;
        assert_eq!(known.status, StatusCode::NOT_MODIFIED);
        let part = client.get(&path, &[("range", "bytes=0-3")]).await;
        assert_eq!((part.status.as_u16(), &part.body[..]), (206, &answer.body[..4]));
        let separator = if address.contains('?') { '&' } else { '?' };
        let versioned = client.get(&format!("{path}{separator}v={version}"), &[]).await;
        assert_eq!(versioned.header("cache-control"), "public, max-age=31536000, immutable");
    }
}

#[tokio::test]
async fn a_304_of_a_variant_needs_no_rendering() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&encoded(&picture(1, 400, 200), ImageFormat::Png))).await;
    let tag = server.get("/images/a?w=128").await.header("etag").to_owned();
    // Another server that has rendered nothing.
    let other = Server::on(&redis, &[]).await.coherent().await;
    let known = get(other.address, "/images/a?w=128", &[("if-none-match", &tag)]).await;
    assert_eq!(known.status, StatusCode::NOT_MODIFIED);
    assert_eq!(other.metric("afterimage_renders_total").await, 0);
}

#[tokio::test]
async fn equivalent_urls_are_rendered_once() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&encoded(&picture(1, 400, 200), ImageFormat::Png))).await;
    let mut tags = std::collections::HashSet::new();
    for address in [
        "a?w=128",
        "a?format=png&w=128",
        "a.png?w=128",
        "a?w=128&fit=cover",
        "a?w=64&dpr=2",
        "a?w=128&q=50",
        "a?w=128&format=auto",
    ] {
        let answer = accepting(&server, &format!("/images/{address}"), "*/*").await;
        tags.insert(answer.header("etag").to_owned());
    }
    assert_eq!(tags.len(), 1, "{tags:?}");
    assert_eq!(server.metric("afterimage_renders_total").await, 1);
    assert_eq!(server.metric("afterimage_cache_images").await, 1);
}

#[tokio::test]
async fn a_bad_parameter_is_400_and_lists_the_allowed_values() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("pictures.widths", "[64, 128]")]).await;
    redis.set("a", &record(&encoded(&picture(1, 400, 200), ImageFormat::Png))).await;
    for (address, says) in [
        ("a?w=65", "`w` must be one of 64, 128"),
        ("a?w=", "`w` must be one of"),
        ("a?w=-1", "`w` must be one of"),
        ("a?w=99999999999999999999", "`w` must be one of"),
        ("a?h=1", "`h` must be one of"),
        ("a?q=81&w=64", "`q` must be one of"),
        ("a?dpr=9&w=64", "`dpr` must be one of 1, 2, 3 ([pictures] dprs)"),
        ("a?fit=squash", "`fit` must be `contain`, `cover` or `fill`"),
        ("a?format=tga", "`format` must be `auto`, `webp`, `jpg` or `png`"),
        ("a?fallback=x", "`fallback` must be `placeholder`"),
        ("a.webp?format=png", "twice"),
        ("a?w=64&w=128", "duplicate"),
        ("a?width=64", "this address takes v, w, h, fit, q, dpr, format and fallback"),
        ("a/thumbnail?w=64", "this address takes the parameters `v` and `fallback`"),
    ] {
        let answer = server.get(&format!("/images/{address}")).await;
        let members = answer.problem(400, "bad-parameter");
        assert!(members["detail"].as_str().unwrap().contains(says), "{members}");
    }
    for (size, says) in [
        ("65x64", "the width must be one of 64, 128"),
        ("64x1", "the height must be one of"),
        ("64", "the height must be one of"),
        ("64x64x64", "the height must be one of"),
        ("64x64?bg=x", "`bg` must be a colour such as"),
        ("64x64?colour=fff", "this address takes text, bg and fg"),
    ] {
        let members =
            server.get(&format!("/placeholders/{size}")).await.problem(400, "bad-parameter");
        assert!(members["detail"].as_str().unwrap().contains(says), "{members}");
    }
    assert_eq!(server.metric("afterimage_renders_total").await, 0);
}

#[tokio::test]
async fn format_auto_follows_accept_and_every_status_varies_by_it() {
    const CHROME: &str = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8";
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let original = encoded(&picture(1, 400, 200), ImageFormat::Png);
    redis.set("a", &record(&original)).await;
    for (accept, media_type) in [
        (CHROME, "image/webp"),
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/webp", "image/webp"),
        ("image/webp;q=0.5, */*;q=0.8", "image/png"),
        ("image/webp;q=0, */*", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("image/png, image/jpeg;q=0.9", "image/png"),
    ] {
        let answer = accepting(&server, "/images/a?format=auto", accept).await;
        assert_eq!(answer.header("content-type"), media_type, "{accept}");
        assert_eq!(answer.header("vary"), "Accept-Encoding, Accept");
        if media_type == "image/png" {
            assert_eq!(answer.body, original);
        }
    }
    let refused = accepting(&server, "/images/a?format=auto", "text/html").await;
    assert_eq!((refused.status.as_u16(), refused.header("vary")), (406, "Accept-Encoding, Accept"));
    for (path, status) in [
        ("/images/absent?format=auto", 404),
        ("/images/-?format=auto", 400),
        ("/images/a?format=auto&w=1", 400),
        ("/images/a?format=%61uto", 200),
        ("/images/a?f%6Frmat=auto&w=64", 200),
        ("/images/absent?format=aut%6F", 404),
    ] {
        let answer = accepting(&server, path, CHROME).await;
        assert_eq!(
            (answer.status.as_u16(), answer.header("vary")),
            (status, "Accept-Encoding, Accept")
        );
    }
    // An address with a format isn't negotiated, so its responses don't vary by Accept.
    assert_eq!(
        accepting(&server, "/images/a.webp", "image/png").await.header("vary"),
        "Accept-Encoding"
    );
}

#[tokio::test]
async fn avif_is_encoded_only_if_the_settings_enable_it() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&encoded(&picture(1, 96, 64), ImageFormat::Png))).await;
    let without = Server::on(&redis, &[]).await;
    without.get("/images/a.avif").await.problem(406, "not-acceptable");
    without.get("/images/a?format=avif").await.problem(400, "bad-parameter");
    let accept = "image/avif,image/webp,*/*;q=0.8";
    let answer = accepting(&without, "/images/a?format=auto", accept).await;
    assert_eq!(answer.header("content-type"), "image/webp");

    let with = Server::on(&redis, &[("pictures.avif", "true")]).await;
    for path in ["/images/a.avif", "/images/a?format=avif&w=64", "/images/a?format=auto"] {
        let answer = accepting(&with, path, accept).await;
        assert_eq!(answer.header("content-type"), "image/avif", "{path}");
        assert_eq!(&answer.body[4..12], b"ftypavif");
    }
    // AVIF of a flat picture would be larger than WebP.
    let flat = RgbImage::from_fn(96, 64, |x, y| Rgb([u8::from(x / 32 == y / 32) * 200; 3]));
    redis.set("flat", &record(&encoded(&flat.into(), ImageFormat::Png))).await;
    for (path, accept, media_type) in [
        ("flat?format=auto&w=64", accept, "image/webp"),
        ("flat?format=auto&w=64", "image/avif, image/webp;q=0", "image/avif"),
        ("flat?format=avif&w=64", accept, "image/avif"),
    ] {
        let answer = accepting(&with, &format!("/images/{path}"), accept).await;
        assert_eq!(answer.header("content-type"), media_type, "{path} {accept}");
    }
}

#[tokio::test]
async fn an_undecodable_image_is_served_unchanged_and_in_no_other_format() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic".to_vec();
    redis.set("heic", &record(&heic)).await;
    redis.set("svg", &record(drawing().as_bytes())).await;
    for (id, bytes) in [("heic", heic), ("svg", drawing().into_bytes())] {
        for query in ["w=128", "format=auto", "w=64&h=64&fit=cover"] {
            let answer = accepting(&server, &format!("/images/{id}?{query}"), "image/*").await;
            assert_eq!(
                (answer.status, &answer.body[..]),
                (StatusCode::OK, &bytes[..]),
                "{id} {query}"
            );
        }
        for address in [format!("{id}.webp"), format!("{id}?format=png")] {
            let answer = server.get(&format!("/images/{address}")).await;
            assert_eq!(answer.status, StatusCode::NOT_ACCEPTABLE, "{address}");
        }
        let info: serde_json::Value =
            serde_json::from_slice(&server.get(&format!("/images/{id}/info")).await.body).unwrap();
        assert!(info["width"].is_null() && info["thumbnail"].is_null(), "{info}");
        let thumbnail = server.get(&format!("/images/{id}/thumbnail")).await;
        assert_eq!((thumbnail.header("content-type"), size(&thumbnail)), ("image/webp", (64, 64)));
    }
    server.get("/images/heic.avif").await.problem(406, "not-acceptable");
}

/// The size and number of frames of an animated WebP.
fn animated(answer: &Answer) -> ((u32, u32), usize) {
    assert_eq!(answer.status, StatusCode::OK, "{:?} {:?}", answer.headers, answer.body);
    assert_eq!(answer.header("content-type"), "image/webp");
    let decoder = WebPDecoder::new(Cursor::new(&answer.body)).unwrap();
    assert!(decoder.has_animation(), "{:?}", answer.headers);
    (decoder.dimensions(), decoder.into_frames().map(Result::unwrap).count())
}

/// True for an animated WebP.
fn moves(answer: &Answer) -> bool {
    answer.body.windows(4).any(|it| it == b"ANMF")
}

#[tokio::test]
async fn an_animation_stays_animated_in_webp() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&animation())).await;
    let webp = server.get("/images/a.webp").await;
    assert_eq!(animated(&webp), ((100, 50), 2));
    assert_eq!(webp.header("cache-status"), "afterimage; fwd=miss; stored");
    redis.set("w", &record(&webp.body)).await;
    for id in ["a", "w"] {
        for path in ["w=64&format=webp", "w=64&h=32&fit=fill&format=webp"] {
            let resized = server.get(&format!("/images/{id}?{path}")).await;
            assert_eq!(animated(&resized), ((64, 32), 2), "{id} {path}");
            let path = format!("/images/{id}?{path}");
            let again = server.get(&path).await;
            assert_eq!(again.header("cache-status"), "afterimage; hit");
            assert_eq!(again.body, resized.body);
        }
        let path = format!("/images/{id}?w=64&format=auto");
        let negotiated = accepting(&server, &path, "image/avif,image/webp,*/*").await;
        assert_eq!(animated(&negotiated), ((64, 32), 2), "{id}");
        for (path, media_type) in [("w=64&format=png", "image/png"), ("format=jpg", "image/jpeg")] {
            let still = server.get(&format!("/images/{id}?{path}")).await;
            assert_eq!(still.header("content-type"), media_type);
        }
        let thumbnail = server.get(&format!("/images/{id}/thumbnail")).await;
        assert_eq!((size(&thumbnail), moves(&thumbnail)), ((64, 64), false));
        assert!(!thumbnail.header("cache-status").contains("first-frame"));
    }
    let resized = server.get("/images/a?w=64").await;
    assert_eq!((resized.header("content-type"), size(&resized)), ("image/png", (64, 32)));
    assert_eq!(animated(&server.get("/images/w?w=64").await), ((64, 32), 2));
}

#[tokio::test]
async fn format_auto_sends_the_smaller_animation() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let moving = animation();
    redis.set("a", &record(&moving)).await;
    for _ in 0..2 {
        let answer = accepting(&server, "/images/a?format=auto", "image/webp,*/*").await;
        assert!(answer.body.len() <= moving.len());
        match answer.header("content-type") {
            "image/gif" => assert_eq!(answer.body[..], moving[..]),
            _ => assert_eq!(animated(&answer), ((100, 50), 2)),
        }
        let answer = accepting(&server, "/images/a?format=auto", "image/jpeg,*/*").await;
        assert_eq!((answer.header("content-type"), &answer.body[..]), ("image/gif", &moving[..]));
    }
}

#[tokio::test]
async fn over_the_limits_of_animations_the_first_frame_is_shown_and_a_header_says_so() {
    let redis = RedisServer::start().await;
    let moving = animation();
    redis.set("a", &record(&moving)).await;
    for limit in [("pictures.max_animation_frames", "1"), ("pictures.max_animation_pixels", "9999")]
    {
        let server = Server::on(&redis, &[limit]).await.coherent().await;
        for path in ["/images/a.webp", "/images/a?w=64&format=webp"] {
            let first = server.get(path).await;
            assert_eq!(
                (first.status, first.header("content-type")),
                (StatusCode::OK, "image/webp")
            );
            assert!(
                !moves(&first) && first.header("cache-status").ends_with("; detail=first-frame")
            );
            let again = server.get(path).await;
            assert_eq!(again.header("cache-status"), "afterimage; hit; detail=first-frame");
            assert_eq!(again.body, first.body);
            let validators = [("if-none-match", first.header("etag"))];
            let unchanged = get(server.address, path, &validators).await;
            assert_eq!(unchanged.status, StatusCode::NOT_MODIFIED);
        }
        let png = server.get("/images/a?w=64&format=png").await;
        assert!(!png.header("cache-status").contains("first-frame"));
        // The original moves.
        let answer = accepting(&server, "/images/a?format=auto", "image/webp,*/*").await;
        assert_eq!((answer.header("content-type"), &answer.body[..]), ("image/gif", &moving[..]));
        assert!(!answer.header("cache-status").contains("first-frame"));
        let large = accepting(&server, "/images/a?w=3840&format=auto", "image/webp,*/*").await;
        assert_eq!(large.body[..], moving[..]);
    }
    let server = Server::on(&redis, &[("pictures.max_animation_pixels", "10000")]).await;
    let all = server.get("/images/a.webp").await;
    assert_eq!(animated(&all), ((100, 50), 2));
    assert!(all.header("etag").contains("-animated-webp"));
}

#[tokio::test]
async fn an_animation_with_a_broken_frame_shows_its_first_frame() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut moving = animation();
    // The smallest code size of the second frame, after its header and its table of colours.
    let control = b"!\xf9\x04";
    let second = moving.windows(3).enumerate().filter(|it| it.1 == control).nth(1).unwrap().0;
    let flags = moving[second + 17];
    let table = if flags & 0x80 == 0 { 0 } else { 6 << (flags & 7) };
    moving[second + 18 + table] = 99;
    redis.set("a", &record(&moving)).await;
    for path in ["/images/a.webp", "/images/a?w=64&format=webp"] {
        let first = server.get(path).await;
        assert_eq!((first.status, moves(&first)), (StatusCode::OK, false));
        assert!(first.header("cache-status").ends_with("; detail=first-frame"));
    }
    let answer = accepting(&server, "/images/a?format=auto", "image/webp,*/*").await;
    assert_eq!(answer.body[..], moving[..]);
}

#[tokio::test]
async fn a_moving_picture_stays_one_for_format_auto_after_somebody_asked_for_a_still() {
    let redis = RedisServer::start().await;
    let limits = [("pictures.max_animation_frames", "1")];
    let server = Server::on(&redis, &limits).await.coherent().await;
    let moving = animation();
    redis.set("a", &record(&moving)).await;
    let still = server.get("/images/a.webp").await;
    assert_eq!(still.header("content-type"), "image/webp");
    let answer = accepting(&server, "/images/a?format=auto", "image/webp,*/*").await;
    assert_eq!((answer.header("content-type"), &answer.body[..]), ("image/gif", &moving[..]));
    // The still isn't what the client has to have for a 304.
    let validators = [("accept", "image/webp,*/*"), ("if-none-match", still.header("etag"))];
    let answer = get(server.address, "/images/a?format=auto", &validators).await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &moving[..]));
}

#[tokio::test]
async fn a_picture_that_cannot_be_converted_is_served_as_it_is_unless_the_address_names_a_format() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("pictures.max_pixels", "5000")]).await.coherent().await;
    let whole = encoded(&picture(1, 60, 60), ImageFormat::Png);
    let broken = whole[..whole.len() / 2].to_vec();
    let large = encoded(&picture(1, 100, 51), ImageFormat::Png);
    for (id, bytes, kind, status, reason) in [
        ("broken", broken, "not-acceptable", 406, "the image is broken"),
        ("large", large, "too-many-pixels", 413, "100×51 pixels, the limit is 5000"),
    ] {
        redis.set(id, &record(&bytes)).await;
        let path = format!("/images/{id}");
        // Twice: what failed is remembered.
        for query in ["", "?format=auto", "?format=auto", "?w=64&format=auto", "?w=64", ".png"] {
            let answer = accepting(&server, &format!("{path}{query}"), "image/webp,*/*").await;
            let expected = ("image/png", &bytes[..]);
            assert_eq!((answer.header("content-type"), &answer.body[..]), expected, "{id}{query}");
        }
        let problem = server.get(&format!("{path}.webp")).await.problem(status, kind);
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(reason) && detail.contains("as it is (image/png)"), "{detail}");
        let accept = "image/webp";
        let answer = accepting(&server, &format!("{path}?format=auto"), accept).await;
        answer.problem(status, kind);

        let info: serde_json::Value =
            serde_json::from_slice(&server.get(&format!("{path}/info")).await.body).unwrap();
        assert_eq!((&info["bytes"], &info["type"]), (&bytes.len().into(), &"image/png".into()));
        for missing in ["width", "height", "thumbhash", "thumbnail"] {
            assert!(info[missing].is_null(), "{info}");
        }
        let thumbnail = server.get(&format!("{path}/thumbnail")).await;
        assert_eq!((thumbnail.header("content-type"), size(&thumbnail)), ("image/webp", (64, 64)));
        let validator = [("if-none-match", thumbnail.header("etag"))];
        let again = get(server.address, &format!("{path}/thumbnail"), &validator).await;
        assert_eq!(again.status, StatusCode::NOT_MODIFIED);
    }
}

#[tokio::test]
async fn a_format_without_room_for_a_picture_gives_way_to_one_that_has_it() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let long = encoded(&picture(1, 2, 16_384), ImageFormat::Jpeg);
    redis.set("jpeg", &record(&long)).await;
    let longer = encoded(&picture(1, 2, 65_501), ImageFormat::Png);
    redis.set("png", &record(&longer)).await;
    let accept = "image/webp,*/*;q=0.8";
    let answer = accepting(&server, "/images/jpeg?w=64&format=auto", accept).await;
    assert_eq!((answer.header("content-type"), size(&answer)), ("image/jpeg", (2, 16_384)));
    let answer = accepting(&server, "/images/jpeg?format=auto", accept).await;
    assert_eq!(answer.body, long);
    let answer = accepting(&server, "/images/png?format=auto", "image/webp, image/jpeg").await;
    let problem = answer.problem(406, "not-acceptable");
    assert!(problem["detail"].as_str().unwrap().contains("jpg has at most 65500"), "{problem}");

    for (path, reason) in [
        (
            "/images/jpeg.webp",
            "webp has at most 16383 pixels a side: the image can be had as jpg or png, and as it is",
        ),
        (
            "/images/png.jpg",
            "jpg has at most 65500 pixels a side: the image can be had as png, and as it is",
        ),
    ] {
        let problem = server.get(path).await.problem(406, "not-acceptable");
        assert!(problem["detail"].as_str().unwrap().starts_with(reason), "{problem}");
    }
    assert_eq!(server.get("/images/jpeg.png").await.status, StatusCode::OK);
}

#[tokio::test]
async fn the_own_type_of_an_image_is_among_the_choices() {
    const JAVA: &str = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2";
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let avif = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf".to_vec();
    let gif = encoded(&picture(1, 40, 20), ImageFormat::Gif);
    let icon = encoded(&picture(1, 32, 32), ImageFormat::Ico);
    let svg = drawing().into_bytes();
    for (id, bytes) in [("gif", &gif), ("avif", &avif), ("svg", &svg), ("ico", &icon)] {
        redis.set(id, &record(bytes)).await;
    }
    for (address, accept, media_type) in [
        ("gif?format=auto", "image/gif", "image/gif"),
        ("gif?format=auto", "image/gif, image/jpeg;q=0.5", "image/gif"),
        ("gif?format=auto", "image/gif;q=0.4, image/jpeg;q=0.5", "image/jpeg"),
        ("gif?format=auto", "image/gif;q=0, */*", "image/png"),
        ("gif?w=16&format=auto", "image/gif", "image/gif"),
        ("gif?w=16&format=auto", "image/gif, image/png;q=0.1", "image/png"),
        ("avif?format=auto", "image/avif,image/webp", "image/avif"),
        ("svg?format=auto", "image/svg+xml", "image/svg+xml"),
        ("svg?format=auto", JAVA, "image/svg+xml"),
        ("ico?format=auto", "image/x-icon", "image/vnd.microsoft.icon"),
    ] {
        let answer = accepting(&server, &format!("/images/{address}"), accept).await;
        assert_eq!(answer.status, StatusCode::OK, "{address} {accept}");
        assert_eq!(answer.header("content-type"), media_type, "{address} {accept}");
    }
    let refused = accepting(&server, "/images/svg?format=auto", "image/svg+xml;q=0, */*").await;
    refused.problem(406, "not-acceptable");
}

#[tokio::test]
async fn format_auto_sends_no_more_bytes_than_the_original_has() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    // Coarse already, so that a better quality only repeats what is wrong with it.
    let mut coarse = Vec::new();
    let noise = |x: u32, y: u32| Rgb([u8::try_from(((x * 97) ^ (y * 31)) % 256).unwrap(); 3]);
    let noise = RgbImage::from_fn(120, 120, noise);
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut coarse, 5);
    noise.write_with_encoder(encoder).unwrap();
    redis.set("a", &record(&coarse)).await;
    for _ in 0..3 {
        let answer = accepting(&server, "/images/a?format=auto", "image/webp,*/*").await;
        assert_eq!(answer.header("content-type"), "image/jpeg");
        assert_eq!(answer.body, coarse);
        // A size that changes nothing is no reason for more bytes.
        let answer = accepting(&server, "/images/a?w=256&format=auto", "image/webp,*/*").await;
        assert!(answer.body.len() <= coarse.len(), "{}", answer.body.len());
    }
    let renders = server.metric("afterimage_renders_total").await;
    assert!(renders <= 2, "{renders}");
    assert_eq!(server.get("/images/a.webp").await.header("content-type"), "image/webp");
    // A client that takes nothing else gets it all the same.
    let answer = accepting(&server, "/images/a?format=auto", "image/webp").await;
    assert_eq!(answer.header("content-type"), "image/webp");
}

#[tokio::test]
async fn only_the_plain_address_gives_embedded_metadata_away() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let plain = encoded(&picture(1, 96, 64), ImageFormat::Jpeg);
    let tagged = |orientation: u8| {
        let mut exif =
            b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\0\0\0\0\0\0\0a secret"
                .to_vec();
        exif[25] = orientation;
        let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
        [&plain[..2], b"\xff\xe1", &length, &exif, &plain[2..]].concat()
    };
    let holds = |bytes: &[u8]| bytes.windows(6).any(|it| it == b"secret");
    for (id, orientation, shown) in [("upright", 1, (96, 64)), ("turned", 6, (64, 96))] {
        let original = tagged(orientation);
        redis.set(id, &record(&original)).await;
        let answer = server.get(&format!("/images/{id}")).await;
        assert_eq!(answer.body, original);
        let versioned = format!("/images/{id}?v={}", answer.header("etag").trim_matches('"'));
        assert_eq!(server.get(&versioned).await.body, original);
        let mut tags = std::collections::HashSet::from([answer.header("etag").to_owned()]);
        for (address, accept) in [
            (".jpg", "*/*"),
            ("?format=jpg", "*/*"),
            ("?format=auto", "*/*"),
            ("?format=auto", "image/jpeg"),
            (".webp", "*/*"),
            (".png", "*/*"),
            ("?w=64", "*/*"),
        ] {
            let path = format!("/images/{id}{address}");
            let answer = accepting(&server, &path, accept).await;
            assert!(!holds(&answer.body), "{path}");
            tags.insert(answer.header("etag").to_owned());
            if address != "?w=64" {
                assert_eq!(size(&answer), shown, "{path}");
            }
            // Each has validators of its own, and is a hit the second time.
            let validator = [("accept", accept), ("if-none-match", answer.header("etag"))];
            let again = get(server.address, &path, &validator).await;
            assert_eq!(again.status, StatusCode::NOT_MODIFIED, "{path}");
            let again = accepting(&server, &path, accept).await;
            assert_eq!(again.header("cache-status"), "afterimage; hit", "{path}");
            assert_eq!(again.body, answer.body, "{path}");
        }
        assert_eq!(tags.len(), 5, "{tags:?}");
    }
    // Nothing else is lost: the same file without its metadata.
    assert_eq!(server.get("/images/upright.jpg").await.body, plain);
}

#[tokio::test]
async fn a_broken_picture_is_decoded_once_and_its_replacement_is_rendered() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let whole = encoded(&picture(1, 60, 60), ImageFormat::Png);
    redis.set("a", &record(&whole[..whole.len() / 2])).await;
    let mut details = std::collections::HashSet::new();
    for path in ["a?w=16&format=webp", "a?w=32&format=jpg", "a.webp", "a.jpg?q=50"] {
        let problem = server.get(&format!("/images/{path}")).await.problem(406, "not-acceptable");
        details.insert(problem["detail"].as_str().unwrap().to_owned());
    }
    for path in ["a/thumbnail", "a?w=16", "a?format=auto", "a/info"] {
        assert_eq!(server.get(&format!("/images/{path}")).await.status, StatusCode::OK, "{path}");
    }
    assert_eq!(details.len(), 1, "{details:?}");
    // The placeholder of the thumbnail. The file shows without a decode that a part of it is missing.
    assert_eq!(server.metric("afterimage_renders_total").await, 1);
    let broken = server.get("/images/a?w=16").await.body;
    redis.set("a", &record(&whole)).await;
    until("the new image is rendered", || async {
        server.get("/images/a?w=16").await.body != broken
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_render_timeout_is_503_and_is_not_cached() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("pictures.timeout", "20ms")]).await.coherent().await;
    redis.set("large", &record(&encoded(&picture(1, 4000, 4000), ImageFormat::Png))).await;
    redis.set("small", &record(&encoded(&picture(1, 16, 16), ImageFormat::Png))).await;
    // The time-out isn't cached: a render that was too slow under load may succeed later.
    for _ in 0..2 {
        let answer = server.get("/images/large.webp").await;
        let problem = answer.problem(503, "render-timeout");
        assert!(problem["detail"].as_str().unwrap().contains("[pictures] timeout"), "{problem}");
        assert_eq!(answer.header("retry-after"), "1");
    }
    // A timed-out render frees its core.
    until("a small picture is made in time", || async {
        server.get("/images/small.webp").await.status == StatusCode::OK
    })
    .await;
    let whole = server.get("/images/large").await;
    assert_eq!(whole.status, StatusCode::OK);
}

#[tokio::test]
async fn variants_of_a_replaced_image_show_the_new_one_at_once() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    for seed in 0..20 {
        let bytes = encoded(&picture(seed * 10, 100, 50), ImageFormat::Png);
        let json = [("content-type", "application/json")];
        let written = server.send(Method::PUT, "/images/a", &json, record(&bytes).into()).await;
        assert!(written.status.is_success());
        for path in ["/images/a?w=64", "/images/a/thumbnail"] {
            let answer = server.get(path).await;
            assert!(answer.header("etag").contains(etag(&record(&bytes)).trim_matches('"')));
            let blue = decoded(&answer).to_rgb8().get_pixel(30, 16).0[2];
            assert!(blue.abs_diff(seed * 10) < 12, "{blue} for {seed}");
        }
    }
}

async fn five_hundred_requests_for_twenty_variants_cost_twenty_renders() {
    let redis = RedisServer::start().await;
    // An unoptimised build renders slowly.
    let server = Server::on(&redis, &[("pictures.timeout", "5min")]).await.coherent().await;
    redis.set("a", &record(&encoded(&picture(1, 1024, 1024), ImageFormat::Png))).await;
    let widths = [16, 32, 48, 64, 96, 128, 256, 320, 384, 512];
    let addresses: Vec<String> = widths
        .iter()
        .flat_map(|w| [format!("/images/a?w={w}"), format!("/images/a.webp?w={w}")])
        .collect();
    let requests: Vec<_> = (0..500)
        .map(|number| {
            let (address, path) = (server.address, addresses[number % addresses.len()].clone());
            tokio::spawn(async move { get(address, &path, &[]).await })
        })
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap().status, StatusCode::OK);
    }
    assert_eq!(server.metric("afterimage_renders_total").await, 20);
    assert_eq!(server.metric("afterimage_fetches_total").await, 1);
    assert_eq!(server.metric("afterimage_in_flight_bytes").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn renders_over_the_queue_limit_get_503_with_retry_after() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("limits.renders", "1")]).await.coherent().await;
    redis.set("a", &record(&encoded(&picture(1, 2000, 2000), ImageFormat::Png))).await;
    let paths = [16, 32, 48, 64, 96, 128].map(|w| format!("/images/a.webp?w={w}"));
    // Each is another client: one alone waits for its turns.
    let requests: Vec<_> = (2..)
        .zip(&paths)
        .map(|(last, path)| {
            let (address, path) = (server.address, path.clone());
            tokio::spawn(async move {
                let stream = connect_from([127, 0, 0, last], address).await;
                Client::over(Protocol::Http1, stream, "a").await.get(&path, &[]).await
            })
        })
        .collect();
    let mut shed = 0;
    for request in requests {
        let answer = request.await.unwrap();
        if answer.status == StatusCode::SERVICE_UNAVAILABLE {
            answer.problem(503, "busy");
            assert_eq!(answer.header("retry-after"), "1");
            shed += 1;
        }
    }
    assert!(shed > 0);
    assert_eq!(server.metric("afterimage_shed_total{limit=\"renders\"}").await, shed);
    until("there is room for another render", || async {
        server.get(&paths[5]).await.status == StatusCode::OK
    })
    .await;
}

#[tokio::test]
async fn info_describes_an_image_as_json() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let bytes = encoded(&picture(1, 400, 200), ImageFormat::Png);
    let value = record(&bytes);
    let mut set = redis::cmd("SET");
    set.arg("image:a").arg(&value).arg("EX").arg(7200);
    set.exec_async(&mut redis.connect().await).await.unwrap();
    let answer = server.get("/images/a/info").await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert_eq!(answer.header("cache-control"), "no-store");
    let info: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(info["id"], "a");
    assert_eq!(info["type"], "image/png");
    assert_eq!((&info["width"], &info["height"]), (&400.into(), &200.into()));
    assert_eq!(info["bytes"], bytes.len());
    assert_eq!(info["etag"], etag(&value));
    assert_eq!(info["url"], format!("/images/a?v={}", etag(&value).trim_matches('"')));
    assert!((7100..=7200).contains(&info["expires_in"].as_u64().unwrap()), "{info}");
    let thumbnail = info["thumbnail"].as_str().unwrap();
    assert!(thumbnail.starts_with("data:image/webp;base64,"));
    // A ThumbHash of about 25 bytes, from which a script draws a preview.
    assert!((20..=40).contains(&info["thumbhash"].as_str().unwrap().len()), "{info}");
    assert_eq!((&info["frames"], &info["duration"]), (&1.into(), &0.into()));
    // Another request renders nothing.
    server.get("/images/a/info").await;
    assert_eq!(server.metric("afterimage_renders_total").await, 2);
    server.get("/images/absent/info").await.problem(404, "absent");
}

#[tokio::test]
async fn info_tells_the_frames_of_an_animation_and_how_long_they_take() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("gif", &record(&animation())).await;
    let webp = server.get("/images/gif.webp").await.body;
    redis.set("webp", &record(&webp)).await;
    let cases = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    for (id, file) in [("avif", "avif-420.avif"), ("film", "avif-sequence.avif")] {
        redis.set(id, &record(&std::fs::read(cases.join(file)).unwrap())).await;
    }
    // A thumbnail is made together with what /info tells.
    server.get("/images/webp/thumbnail").await;
    let null = serde_json::Value::Null;
    for (id, frames, duration) in [
        ("gif", &2.into(), &200.into()),
        ("webp", &2.into(), &200.into()),
        ("avif", &1.into(), &0.into()),
        ("film", &null, &null),
    ] {
        let info = server.get(&format!("/images/{id}/info")).await;
        let info: serde_json::Value = serde_json::from_slice(&info.body).unwrap();
        assert_eq!((&info["frames"], &info["duration"]), (frames, duration), "{id} {info}");
    }
}

#[tokio::test]
async fn a_placeholder_is_drawn_in_any_allowed_size() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    for path in [
        "/placeholders/640x360",
        "/placeholders/64x64?text=",
        "/placeholders/320x200?text=Sunset%20over%20Oslo&bg=f80,08f&fg=fff",
    ] {
        let answer = server.get(path).await;
        assert_eq!(answer.header("content-type"), "image/webp");
        let named = path.split(['/', '?']).nth(2).unwrap().to_owned();
        let (width, height) = size(&answer);
        assert_eq!(format!("{width}x{height}"), named);
        assert_eq!(answer.header("cache-control"), "public, max-age=3600, immutable");
        let again = server.get(path).await;
        assert_eq!((again.header("cache-status"), &again.body), ("afterimage; hit", &answer.body));
        let tag = answer.header("etag");
        let known = get(server.address, path, &[("if-none-match", tag)]).await;
        assert_eq!(known.status, StatusCode::NOT_MODIFIED);
        // As of any image.
        assert_eq!(answer.header("accept-ranges"), "bytes");
        let part = get(server.address, path, &[("range", "bytes=2-5")]).await;
        assert_eq!((part.status.as_u16(), &part.body[..]), (206, &answer.body[2..6]));
        assert_eq!(part.header("content-range"), format!("bytes 2-5/{}", answer.body.len()));
        assert_eq!(part.header("cache-control"), answer.header("cache-control"));
        let other = [("range", "bytes=2-5"), ("if-range", "\"x\"")];
        assert_eq!(get(server.address, path, &other).await.body, answer.body);
        let behind = get(server.address, path, &[("range", "bytes=999999-")]).await;
        behind.problem(416, "range-not-satisfiable");
    }
}

#[tokio::test]
async fn a_placeholder_is_the_fallback_for_a_missing_image() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let shown = |answer: &Answer, status: u16| {
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("content-type"), "image/webp");
        assert_eq!(answer.header("cache-control"), "no-store");
        let picture = image::load_from_memory_with_format(&answer.body, ImageFormat::WebP).unwrap();
        (picture.width(), picture.height())
    };
    let absent = server.get("/images/a?fallback=placeholder").await;
    assert_eq!(shown(&absent, 404), (512, 512));
    let absent = server.get("/images/a?fallback=placeholder&w=320&h=200").await;
    assert_eq!(shown(&absent, 404), (320, 200));
    // A bad address is still an error.
    server.get("/images/-?fallback=placeholder").await.problem(400, "bad-id");
    // Once the image exists it is served.
    redis.set("a", &record(&encoded(&picture(1, 100, 50), ImageFormat::Png))).await;
    until("the image is shown", || async {
        server.get("/images/a?fallback=placeholder").await.header("content-type") == "image/png"
    })
    .await;
    redis.kill();
    until("the outage is noticed", || async {
        let answer = server.get("/images/b?fallback=placeholder").await;
        answer.status == StatusCode::SERVICE_UNAVAILABLE && shown(&answer, 503) == (512, 512)
    })
    .await;
}

#[tokio::test]
async fn metadata_of_a_picture_that_is_not_decoded_are_removed_whatever_was_asked_before() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("pictures.max_pixels", "100")]).await.coherent().await;
    let mut bytes = encoded(&picture(1, 40, 20), ImageFormat::Jpeg);
    // Behind the pixels.
    let end = bytes.len() - 2;
    bytes.splice(end..end, *b"\xff\xfe\0\x08secret");
    redis.set("a", &record(&bytes)).await;
    let holds = |bytes: &[u8]| bytes.windows(6).any(|it| it == b"secret");
    for path in ["a.jpg", "a/info", "a.webp", "a.jpg", "a?format=auto", "a?w=16", "a/thumbnail"] {
        let answer = server.get(&format!("/images/{path}")).await;
        assert!(!holds(&answer.body), "{path}");
        assert_eq!(answer.status == StatusCode::OK, path != "a.webp", "{path}");
    }
    assert!(holds(&server.get("/images/a").await.body));
    let webp = b"RIFF\x10\0\0\0WEBPVP8L\x04\0\0\0abcd".to_vec();
    redis.set("webp", &record(&webp)).await;
    let thumbnail = server.get("/images/webp/thumbnail").await;
    assert!(thumbnail.status == StatusCode::OK && thumbnail.body != webp);
}
