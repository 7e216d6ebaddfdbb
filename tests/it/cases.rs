//! Inputs that were answered wrongly once, or are like those: `tests/cases/cases.tsv` says what each must give.
//!
//! A line has five fields between tabs: the file; the end of the address, or `-`; `Accept`, or `-` for none; what the answer
//! must be; and who shows the file so. Files `record-*` are stored as they are, all others as `base64_data`. Pixels are met
//! within 3.

use std::fmt::Write as _;
use std::path::Path;

use hyper::StatusCode;
use serde_json::Value;

use crate::harness::{Answer, RedisServer, Server, get, record};

const CHROME: &str = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8";

#[tokio::test(flavor = "multi_thread")]
async fn each_input_that_went_wrong_once_is_answered_rightly() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let table = std::fs::read_to_string(folder.join("cases.tsv")).unwrap();
    let (mut wrong, mut count) = (String::new(), 0);
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        let [file, end, accept, expected, _who] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("five fields are expected: {line}");
        };
        let input = std::fs::read(folder.join(file)).unwrap();
        let value = if file.starts_with("record-") { input.clone() } else { record(&input) };
        let id = file.replace('.', "_");
        redis.set(&id, &value).await;
        let path = format!("/images/{id}{}", if end == "-" { "" } else { end });
        let accept = if accept == "chrome" { CHROME } else { accept };
        let headers = [("accept", accept)];
        let headers = if accept == "-" { &[][..] } else { &headers };
        // Twice: from the store, and from memory.
        for _ in 0..2 {
            let answer = get(server.address, &path, headers).await;
            for each in expected.split("; ") {
                if let Err(got) = check(each, &input, &answer) {
                    let status = answer.status;
                    writeln!(wrong, "{file} {end}: expected {each}, got {status} {got}").unwrap();
                }
            }
        }
        count += 1;
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    println!("{count} cases");
}

fn check(expected: &str, input: &[u8], answer: &Answer) -> Result<(), String> {
    let (what, expected) = expected.split_once(' ').unwrap_or((expected, ""));
    let detail = || {
        let text = String::from_utf8_lossy(&answer.body);
        let start: String = text.chars().take(300).collect();
        format!("{} {start}", answer.header("content-type"))
    };
    if what == "status" {
        let status = answer.status.as_str();
        let is_right = status == expected || (expected == "4xx" && status.starts_with('4'));
        return if is_right { Ok(()) } else { Err(detail()) };
    }
    if answer.status != StatusCode::OK {
        return Err(detail());
    }
    match what {
        "original" if answer.body == input => Ok(()),
        "type" if answer.header("content-type").starts_with(expected) => Ok(()),
        "info" => {
            let info: Value = serde_json::from_slice(&answer.body).map_err(|_why| detail())?;
            let size = match (&info["width"], &info["height"]) {
                (Value::Null, Value::Null) => "null".to_owned(),
                (width, height) => format!("{width}x{height}"),
            };
            if size == expected { Ok(()) } else { Err(info.to_string()) }
        }
        "bytes" => {
            let most = expected.strip_prefix("<= ").unwrap().parse().unwrap();
            if answer.body.len() <= most { Ok(()) } else { Err(answer.body.len().to_string()) }
        }
        "size" => {
            let picture = image::load_from_memory(&answer.body).map_err(|_why| detail())?;
            let size = format!("{}x{}", picture.width(), picture.height());
            if size == expected { Ok(()) } else { Err(size) }
        }
        "pixel" => {
            let picture =
                image::load_from_memory(&answer.body).map_err(|_why| detail())?.into_rgba8();
            let (place, expected) = expected.split_once(" = ").unwrap();
            let numbers = |text: &str| -> Vec<u32> {
                text.split(',').map(|number| number.trim().parse().unwrap()).collect()
            };
            let (place, expected) = (numbers(place), numbers(expected));
            let pixel = picture.get_pixel_checked(place[0], place[1]);
            let pixel = pixel.ok_or_else(|| "a smaller picture".to_owned())?.0.map(u32::from);
            if pixel[3].max(expected[3]) == 0 {
                // A transparent pixel has no colour.
                return Ok(());
            }
            let is_near = pixel.iter().zip(&expected).all(|(it, other)| it.abs_diff(*other) <= 3);
            if is_near { Ok(()) } else { Err(format!("{pixel:?}")) }
        }
        _ => Err(detail()),
    }
}
