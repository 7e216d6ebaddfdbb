//! Tells SVG as browsers do: from the root element of the XML document.

use std::borrow::Cow;

use quick_xml::Reader;
use quick_xml::escape::unescape_with;
use quick_xml::events::{BytesStart, Event};
use quick_xml::name::PrefixDeclaration;

/// Length of the start of a file that is parsed, in bytes. The start tag of the root element must end in it. Document
/// types of drawing programs have a few kilobytes.
const PREFIX: usize = 256 * 1024;

/// The namespace of SVG (SVG 2 §5.1.2).
const NAMESPACE: &str = "http://www.w3.org/2000/svg";

/// Longest value of a namespace declaration that is looked at, in bytes. With references it may be longer than the
/// namespace.
const LONGEST_VALUE: usize = 64;

/// Tells whether bytes are an XML document whose root element is `svg`.
///
/// Before the root may come a byte order mark, white space, the XML declaration, processing instructions, comments and
/// a document type (XML 1.0 §2.8). Nothing after the start tag of the root is looked at. UTF-16 is told by its byte
/// order mark, or by the XML declaration. Of other encodings only the ASCII part is read.
pub(super) fn is_svg(bytes: &[u8]) -> bool {
    let text = ascii_compatible(&bytes[..bytes.len().min(PREFIX)]);
    let mut reader = Reader::from_reader(&*text);
    let mut document_type = Cow::default();
    loop {
        match reader.read_event() {
            Ok(Event::Decl(_) | Event::PI(_) | Event::Comment(_)) => {}
            Ok(Event::Text(text)) if text.iter().copied().all(is_space) => {}
            Ok(Event::DocType(text)) => document_type = text.into_inner(),
            Ok(Event::Start(root) | Event::Empty(root)) => {
                return is_svg_root(&root, &document_type);
            }
            _ => return false,
        }
    }
}

/// White space of XML 1.0 §2.3, which has no form feed.
const fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// The text without its byte order mark, in an encoding that has ASCII. UTF-16 without its mark is an error in XML, but
/// browsers show such documents, if not in `<img>`; it is told as XML 1.0 §F.1 says.
fn ascii_compatible(bytes: &[u8]) -> Cow<'_, [u8]> {
    let utf_16 = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let (pairs, _) = bytes.as_chunks::<2>();
        let characters = char::decode_utf16(pairs.iter().copied().map(unit));
        let text: String = characters.map(|it| it.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
        Cow::Owned(text.into_bytes())
    };
    match bytes {
        [0xff, 0xfe, text @ ..] => utf_16(text, u16::from_le_bytes),
        [0xfe, 0xff, text @ ..] => utf_16(text, u16::from_be_bytes),
        [b'<', 0, b'?', 0, ..] => utf_16(bytes, u16::from_le_bytes),
        [0, b'<', 0, b'?', ..] => utf_16(bytes, u16::from_be_bytes),
        text => Cow::Borrowed(text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)),
    }
}

/// Tells whether a root element is `svg` in the namespace of SVG.
///
/// Without a prefix it may lack the namespace: browsers show no such file, other programs do.
fn is_svg_root(root: &BytesStart<'_>, document_type: &[u8]) -> bool {
    let (name, prefix) = root.name().decompose();
    if name.as_ref() != b"svg" {
        return false;
    }
    let declares = |declared: PrefixDeclaration<'_>| match (declared, prefix) {
        (PrefixDeclaration::Default, None) => true,
        (PrefixDeclaration::Named(declared), Some(prefix)) => declared == prefix.as_ref(),
        _ => false,
    };
    // The check for duplicates takes quadratic time.
    let mut attributes = root.attributes();
    let mut attributes = attributes.with_checks(false).flatten();
    let declaration = attributes.find(|it| it.key.as_namespace_binding().is_some_and(declares));
    match declaration {
        Some(declaration) => is_svg_namespace(&declaration.value, document_type),
        None if prefix.is_none() => true,
        // The default of an attribute list may declare the prefix (XML 1.0 §3.3.2).
        None => document_type.windows(NAMESPACE.len()).any(|it| it == NAMESPACE.as_bytes()),
    }
}

/// Tells whether the value of a namespace declaration is the namespace of SVG. Adobe Illustrator writes
/// `xmlns="&ns_svg;"` and declares the entity in the document type.
fn is_svg_namespace(value: &[u8], document_type: &[u8]) -> bool {
    value.len() <= LONGEST_VALUE
        && std::str::from_utf8(value)
            .ok()
            .and_then(|value| unescape_with(value, |name| entity(name, document_type)).ok())
            .is_some_and(|value| value == NAMESPACE)
}

/// The value of an internal entity (XML 1.0 §4.2), if it is short enough for a namespace. The first declaration counts.
/// References in the value aren't replaced: in a namespace Chromium refuses them too, and nothing can grow.
fn entity<'a>(name: &str, document_type: &'a [u8]) -> Option<&'a str> {
    let mut in_comment = false;
    for markup in document_type.split(|byte| *byte == b'<') {
        in_comment |= markup.starts_with(b"!--");
        if in_comment {
            in_comment = !markup.windows(3).any(|it| it == b"-->");
            continue;
        }
        let Some(value) = markup
            .strip_prefix(b"!ENTITY")
            .map(<[u8]>::trim_ascii_start)
            .and_then(|markup| markup.strip_prefix(name.as_bytes()))
            .filter(|value| value.first().copied().is_some_and(is_space))
        else {
            continue;
        };
        let (quote, value) = value.trim_ascii_start().split_first()?;
        let length = value.iter().take(NAMESPACE.len() + 1).position(|byte| byte == quote)?;
        return std::str::from_utf8(&value[..length]).ok();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts `NS` for the namespace, to keep lines short.
    fn told(text: &str) -> bool {
        is_svg(text.replace("NS", NAMESPACE).as_bytes())
    }

    fn utf_16(text: &str, bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
        text.replace("NS", NAMESPACE).encode_utf16().flat_map(bytes).collect()
    }

    #[test]
    fn the_root_is_told_by_its_namespace() {
        for text in [
            "<svg xmlns='NS'/>",
            "<svg\n\txmlns = \"NS\" width='1'>",
            "<ns0:svg xmlns:ns0='NS'>",
            "<é:svg xmlns:é='NS'>",
            "<s:svg xmlns='urn:x' xmlns:s='NS'>",
            "<svg a='>' b=\"'>\" xmlns='NS'>",
            "<svg xmlns='http:&#47;&#x2F;www.w3.org/2000/svg'>",
            "<svg>",
            "<svg xmlns:a='urn:x'>",
            "<svg xmlns='NS' a=1 a=2>",
        ] {
            assert!(told(text), "{text}");
        }
        for text in [
            "",
            "svg",
            "<svg",
            "<svg xmlns='NS'",
            "<svg xmlns='NS' a='>",
            "<svgfoo xmlns='NS'>",
            "<SVG xmlns='NS'>",
            "<svg xmlns='urn:x'>",
            "<svg xmlns=''>",
            "<svg xmlns=' NS '>",
            "<svg xmlns='NS/'>",
            "<s:svg xmlns:s='urn:x' xmlns='NS'>",
            "<s:svg xmlns='NS'>",
            "<svg:svg>",
            "<s:svg:svg xmlns:s='NS'>",
            "<g xmlns='NS'><svg/></g>",
            "<html xmlns='http://www.w3.org/1999/xhtml'><svg xmlns='NS'/></html>",
            "<math xmlns='http://www.w3.org/1998/Math/MathML'/>",
            "<?xml version='1.0'?><rss version='2.0'><svg/></rss>",
            "text <svg xmlns='NS'/>",
            "&amp;<svg xmlns='NS'/>",
            "<![CDATA[ ]]><svg xmlns='NS'/>",
            "</svg><svg xmlns='NS'/>",
            "\u{b}<svg xmlns='NS'/>",
            "\0<svg xmlns='NS'/>",
        ] {
            assert!(!told(text), "{text}");
        }
    }

    #[test]
    fn any_prolog_may_come_before_the_root() {
        for prolog in [
            " \r\n\t",
            "\u{feff}",
            "\u{feff}\n<?xml version='1.0' encoding='utf-16' standalone='no'?>",
            "<?xml version='1.1' encoding='windows-1252'?><!-- > <a> --><?p <b> > ?>\n",
            "<!DOCTYPE svg>",
            "<!doctype html>",
            "<!DOCTYPE svg PUBLIC \"-//W3C//DTD SVG 1.1//EN\" 'http://a/[b]>'>",
            "<!DOCTYPE svg [ <!-- arr[0] = b[1] > ' \" --> <!ENTITY a \"b\"> ]>",
            "<!DOCTYPE svg [<!ATTLIST svg xmlns:a CDATA #FIXED \"http://a[0]/\">]>",
            "<!DOCTYPE svg [<!ATTLIST svg a CDATA \"a > b ]> c\" b CDATA '\"]>'>]>",
            "<!DOCTYPE svg [<!ENTITY a \"x > y ]> z\"><!ENTITY b ']><foo>'>]>",
            "<!DOCTYPE svg [<?foo ]> \" ?>\n<?x?> ]\n>\n",
            "<!DOCTYPE svg [<!NOTATION g PUBLIC \"a]>\" 'b]>'><!ELEMENT svg (a|b)*>]>",
            "<!DOCTYPE svg [<!ENTITY % e \"<!ENTITY a 'b'>\"> %e; ]>",
        ] {
            assert!(told(&format!("{prolog}<svg xmlns='NS'/>")), "{prolog}");
            assert!(!told(&format!("{prolog}<html><svg xmlns='NS'/></html>")), "{prolog}");
        }
        for prolog in [
            "<!-- ",
            "<? ",
            "<!DOCTYPE svg [ ",
            "<!DOCTYPE svg [ <!ENTITY a \"b> ]>",
            "<!DOCTYPE svg [ <!-- ]> ",
            "<!DOCTYPE svg SYSTEM 'a>",
            "<!FOO>",
        ] {
            assert!(!told(&format!("{prolog}<svg xmlns='NS'/>")), "{prolog}");
        }
    }

    #[test]
    fn an_entity_may_stand_for_the_namespace() {
        for (subset, root) in [
            ("<!ENTITY n 'NS'>", "<svg xmlns='&n;'>"),
            ("<!ENTITY m 'urn:x'>\n<!ENTITY\tn  \"NS\" >", "<s:svg xmlns:m='&m;' xmlns:s='&n;'>"),
            ("<!ENTITY w 'http://www.w3.org'>", "<svg xmlns='&w;/2000/svg'>"),
            (
                "<!-- <!ENTITY n 'urn:x'> --><!ENTITY n 'NS'><!ENTITY n 'urn:x'>",
                "<svg xmlns='&n;'>",
            ),
            ("<!ENTITY % e \"<!ENTITY n 'NS'>\"> %e;", "<svg xmlns='&n;'>"),
            ("<!ATTLIST s:svg xmlns:s CDATA #FIXED 'NS'>", "<s:svg>"),
        ] {
            let text = format!("<!DOCTYPE svg [{subset}]>{root}");
            assert!(told(&text), "{text}");
        }
        for (subset, root) in [
            ("", "<svg xmlns='&n;'>"),
            ("<!ENTITY nn 'NS'>", "<svg xmlns='&n;'>"),
            ("<!ENTITY n 'urn:x'><!ENTITY m 'NS'>", "<svg xmlns='&n;'>"),
            ("<!ENTITY n SYSTEM 'NS'>", "<svg xmlns='&n;'>"),
            ("<!ENTITY n 'NS", "<svg xmlns='&n;'>"),
            ("<!ENTITY n 'NS'>", "<svg xmlns='&n'>"),
            ("<!ENTITY n", "<svg xmlns='&n;'>"),
        ] {
            let text = format!("<!DOCTYPE svg [{subset}]>{root}");
            assert!(!told(&text), "{text}");
        }
    }

    #[test]
    fn entities_that_multiply_are_not_expanded() {
        let levels = (1..20).map(|level| {
            let references = format!("&a{};", level - 1).repeat(10);
            format!("<!ENTITY a{level} '{references}'>")
        });
        let subset: String =
            std::iter::once("<!ENTITY a0 'ten chars.'>".into()).chain(levels).collect();
        assert!(!told(&format!("<!DOCTYPE svg [{subset}]><svg xmlns='&a19;'>")));
        assert!(told(&format!("<!DOCTYPE svg [{subset}]><svg xmlns='NS'>&a19;")));
        assert!(!told(&format!("<svg xmlns='{}'>", "&a;".repeat(10_000))));
    }

    #[test]
    fn utf_16_needs_its_byte_order_mark_or_the_declaration() {
        let text = "<?xml version='1.0' encoding='UTF-16'?>\r\n<!DOCTYPE svg [<!-- 😀 ] -->]>\n<svg xmlns='NS'/>";
        for bytes in [u16::to_le_bytes, u16::to_be_bytes] {
            assert!(is_svg(&utf_16(&format!("\u{feff}{text}"), bytes)));
            assert!(is_svg(&[utf_16("\u{feff}<svg>", bytes), vec![0xd8]].concat()));
            assert!(is_svg(&utf_16(text, bytes)));
            assert!(!is_svg(&utf_16("<svg xmlns='NS'/>", bytes)));
            assert!(!is_svg(&utf_16("<?xml version='1.0'?><html/>", bytes)));
            assert!(!is_svg(&utf_16("\u{feff}<html><svg/></html>", bytes)));
        }
        let utf_32: Vec<u8> =
            "\u{feff}<svg/>".chars().flat_map(|it| u32::from(it).to_le_bytes()).collect();
        assert!(!is_svg(&utf_32));
    }

    #[test]
    fn bytes_that_are_not_utf_8_may_stand_in_the_prolog() {
        assert!(is_svg(
            b"<?xml version='1.0' encoding='iso-8859-1'?><!-- \xe9 --><!DOCTYPE svg [<!-- \x80 -->]><svg a='\xe9'>"
        ));
    }

    #[test]
    fn the_start_tag_of_the_root_must_end_in_the_prefix() {
        let comment = |length: usize| format!("<!--{}-->", " ".repeat(length - 7));
        assert!(told(&(comment(PREFIX - 5) + "<svg>")));
        assert!(!told(&(comment(PREFIX - 4) + "<svg>")));
        assert!(told(&format!("<svg a='{}'>", " ".repeat(PREFIX - 10))));
        assert!(!is_svg(&vec![b'<'; PREFIX * 2]));
        assert!(!is_svg(&vec![b' '; PREFIX * 2]));
    }
}
