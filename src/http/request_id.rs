//! `X-Request-Id`: the id under which a request is found in the logs of all servers that saw it.

use axum::http::{HeaderName, HeaderValue};

use crate::image::digits;

/// The field's name.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The id of a request.
#[derive(Debug)]
pub(crate) enum RequestId {
    /// Given by the client.
    Given(HeaderValue),
    /// Made by this server: hexadecimal digits. A header value would have to be allocated and checked.
    Own([u8; 32]),
}

impl RequestId {
    /// Returns the client's id, if it is fit to be repeated, or makes one.
    pub(crate) fn of(given: Option<&[u8]>) -> RequestId {
        let fit = |id: &&[u8]| (1..=128).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic);
        let given = given.filter(fit).and_then(|id| HeaderValue::from_bytes(id).ok());
        given.map_or_else(|| RequestId::Own(random_digits()), RequestId::Given)
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            RequestId::Given(id) => id.as_bytes(),
            RequestId::Own(digits) => digits,
        }
    }

    pub(crate) fn value(&self) -> HeaderValue {
        match self {
            RequestId::Given(id) => id.clone(),
            RequestId::Own(digits) => {
                HeaderValue::from_bytes(digits).expect("hex digits are ASCII")
            }
        }
    }
}

fn random_digits() -> [u8; 32] {
    let mut text = [0; 32];
    for (two, byte) in text.chunks_exact_mut(2).zip(fastrand::u128(..).to_be_bytes()) {
        two.copy_from_slice(&digits(byte));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_of_the_clients_is_kept_if_it_is_fit_to_be_repeated() {
        let id = |text: &str| {
            String::from_utf8(RequestId::of(Some(text.as_bytes())).as_bytes().to_vec()).unwrap()
        };
        assert_eq!(id("a-1:B/2"), "a-1:B/2");
        for unfit in ["", "a b", "ä", &"x".repeat(129)] {
            let own = id(unfit);
            assert!(own.len() == 32 && own.bytes().all(|it| it.is_ascii_hexdigit()), "{own}");
        }
    }
}
