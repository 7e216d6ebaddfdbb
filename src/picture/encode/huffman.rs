//! Fits the Huffman tables of a baseline JPEG to its picture.
//!
//! jpeg-encoder writes all components in one scan with the tables of ITU-T T.81 annex K.3 only. Here the coefficients stay
//! as they are; their symbols are read, counted, and written again with the shortest codes.

/// Huffman tables: two classes, DC and AC, of four each (ITU-T T.81 B.2.4.2).
const TABLES: usize = 8;

/// Rewrites a baseline JPEG of one scan with the best tables. `None` for a JPEG of another kind.
pub(super) fn optimise(jpeg: &[u8]) -> Option<Vec<u8>> {
    let Head { mut kept, scan_header, tables, layout, entropy_coded } = Head::parse(jpeg)?;
    let bits = unstuff(entropy_coded)?;

    let mut counts = [[0_u32; 256]; TABLES];
    layout.walk(&bits, &tables, |table, symbol, _| counts[table][usize::from(symbol)] += 1)?;
    let codes = counts.map(|counts| {
        let used = counts.iter().any(|count| *count > 0);
        used.then(|| Codes::shortest(&counts))
    });

    let mut definitions = Vec::new();
    for (table, codes) in codes.iter().enumerate() {
        let Some(codes) = codes else { continue };
        definitions.push(u8::try_from(table / 4 * 16 + table % 4).ok()?);
        definitions.extend(codes.lengths);
        definitions.extend(&codes.symbols);
    }
    kept.extend([0xFF, 0xC4]);
    kept.extend(u16::try_from(definitions.len() + 2).ok()?.to_be_bytes());
    kept.extend(definitions);
    kept.extend(scan_header);

    let codes = codes.map(Option::unwrap_or_default);
    let mut writer = BitWriter { bytes: kept, pending: 0, count: 0 };
    layout.walk(&bits, &tables, |table, symbol, (value, length)| {
        let (code, code_length) = codes[table].of[usize::from(symbol)];
        writer.write(code.into(), code_length);
        writer.write(value, length);
    })?;
    Some(writer.finish())
}

/// The parts of a JPEG.
struct Head<'a> {
    /// Everything before the scan but for the tables.
    kept: Vec<u8>,
    scan_header: &'a [u8],
    tables: [Option<Table>; TABLES],
    layout: Layout,
    entropy_coded: &'a [u8],
}

impl<'a> Head<'a> {
    fn parse(jpeg: &'a [u8]) -> Option<Self> {
        let mut rest = jpeg.strip_prefix(&[0xFF, 0xD8])?.strip_suffix(&[0xFF, 0xD9])?;
        let mut kept = vec![0xFF, 0xD8];
        let mut tables = [const { None }; TABLES];
        let mut frame = None;
        loop {
            let &[0xFF, marker, high, low, ..] = rest else { return None };
            let length = 2 + usize::from(u16::from_be_bytes([high, low]));
            let (segment, after) = rest.split_at_checked(length)?;
            let body = segment.get(4..)?;
            rest = after;
            match marker {
                // DHT.
                0xC4 => Table::read_all(body, &mut tables)?,
                // SOS.
                0xDA => {
                    let layout = Layout::new(frame?, body)?;
                    return Some(Head {
                        kept,
                        scan_header: segment,
                        tables,
                        layout,
                        entropy_coded: rest,
                    });
                }
                // SOF0 is baseline; other frames and restart intervals aren't written here.
                0xC1..=0xCF | 0xDD => return None,
                _ => {
                    if marker == 0xC0 {
                        frame = Some(body);
                    }
                    kept.extend(segment);
                }
            }
        }
    }
}

/// The order of blocks in a scan (ITU-T T.81 A.2).
struct Layout {
    /// Tables for DC and AC of each block of an MCU.
    blocks: Vec<(usize, usize)>,
    /// MCUs in the picture.
    mcus: u64,
}

impl Layout {
    /// Reads a frame header (B.2.2) and the header of a scan of all its components (B.2.3).
    fn new(frame: &[u8], scan: &[u8]) -> Option<Self> {
        let (&[_, y1, y0, x1, x0, count], components) = frame.split_first_chunk()?;
        let (&scanned, selectors) = scan.split_first()?;
        if count != scanned {
            return None;
        }
        let count = usize::from(count);
        let (components, []) = components.as_chunks::<3>() else { return None };
        let (selectors, _) = selectors.get(..2 * count)?.as_chunks::<2>();
        if components.len() != count {
            return None;
        }
        let mut blocks = Vec::new();
        let (mut widest, mut highest) = (1, 1);
        for (&[id, sampling, _], &[selected, selected_tables]) in components.iter().zip(selectors) {
            let (h, v) = (sampling >> 4, sampling & 15);
            let (dc, ac) = (selected_tables >> 4, selected_tables & 15);
            // A.2.2: a component alone has no MCUs of several blocks.
            let is_odd = count == 1 && (h, v) != (1, 1);
            if id != selected
                || is_odd
                || !(1..=4).contains(&h)
                || !(1..=4).contains(&v)
                || dc > 3
                || ac > 3
            {
                return None;
            }
            (widest, highest) = (widest.max(h), highest.max(v));
            let tables = (usize::from(dc), 4 + usize::from(ac));
            blocks.extend(std::iter::repeat_n(tables, usize::from(h * v)));
        }
        let mcus = |length: [u8; 2], factor: u8| {
            u64::from(u16::from_be_bytes(length)).div_ceil(8 * u64::from(factor))
        };
        Some(Layout { blocks, mcus: mcus([x1, x0], widest) * mcus([y1, y0], highest) })
    }

    /// Calls back for each symbol of a scan: with its table, itself, and the bits after it with their number (F.2.2).
    fn walk(
        &self,
        bits: &[u8],
        tables: &[Option<Table>; TABLES],
        mut found: impl FnMut(usize, u8, (u32, u8)),
    ) -> Option<()> {
        let mut reader = BitReader { bytes: bits, at: 0, word: 0 };
        for _ in 0..self.mcus {
            for &(dc, ac) in &self.blocks {
                let (dc_table, ac_table) = (tables[dc].as_ref()?, tables[ac].as_ref()?);
                let symbol = reader.symbol(dc_table)?;
                found(dc, symbol, reader.value(symbol));
                let mut index = 1;
                while index < 64 {
                    let symbol = reader.symbol(ac_table)?;
                    found(ac, symbol, reader.value(symbol));
                    match (symbol >> 4, symbol & 15) {
                        // The end of the block.
                        (0, 0) => break,
                        (1..15, 0) => return None,
                        (zeros, _) => index += 1 + u32::from(zeros),
                    }
                }
            }
        }
        // A picture that is cut off would end in the bytes that `unstuff` adds.
        (reader.at <= 8 * bits.len().checked_sub(AHEAD)?).then_some(())
    }
}

/// Codes to read (ITU-T T.81 F.2.2.3), aligned to the left of 16 bits.
struct Table {
    /// For each length the first code, the code after the last one, and the index of the first symbol.
    lengths: [(u32, u32, usize); 16],
    symbols: Vec<u8>,
    /// For each byte that begins with a whole code its length and symbol; or else a length of 0.
    short: [(u8, u8); 256],
}

impl Table {
    fn read_all(mut body: &[u8], tables: &mut [Option<Table>; TABLES]) -> Option<()> {
        while let Some((&id, rest)) = body.split_first() {
            let (counts, rest) = rest.split_first_chunk::<16>()?;
            let (mut next, mut index) = (0, 0);
            let lengths = std::array::from_fn(|at| {
                let (first, first_index) = (next, index);
                next += u32::from(counts[at]) << (15 - at);
                index += usize::from(counts[at]);
                (first, next, first_index)
            });
            let (symbols, rest) = rest.split_at_checked(index)?;
            let slot = usize::from(id >> 4) * 4 + usize::from(id & 3);
            let mut table = Table { lengths, symbols: symbols.to_vec(), short: [(0, 0); 256] };
            for byte in 0..=u8::MAX {
                let code = table.find(u32::from(byte) << 8);
                if let Some(short) = code.filter(|(length, _)| *length <= 8) {
                    table.short[usize::from(byte)] = short;
                }
            }
            *tables.get_mut(slot)? = Some(table);
            body = rest;
        }
        Some(())
    }

    /// The length of the code that 16 bits begin with, and its symbol.
    fn find(&self, bits: u32) -> Option<(u8, u8)> {
        let (length, (first, _, index)) =
            (1..).zip(self.lengths).find(|(_, (_, end, _))| bits < *end)?;
        let symbol = self.symbols.get(index + ((bits - first) >> (16 - length)) as usize)?;
        Some((length, *symbol))
    }
}

/// Codes to write.
struct Codes {
    /// Number of codes of each length.
    lengths: [u8; 16],
    /// Symbols by length.
    symbols: Vec<u8>,
    /// The code of each symbol and its length.
    of: [(u16, u8); 256],
}

impl Default for Codes {
    fn default() -> Self {
        Codes { lengths: [0; 16], symbols: Vec::new(), of: [(0, 0); 256] }
    }
}

impl Codes {
    /// The shortest codes for symbols with these counts (ITU-T T.81 K.2).
    fn shortest(counts: &[u32; 256]) -> Self {
        /// Stands for the code of ones only, which isn't allowed.
        const RESERVED: usize = 256;
        let mut weights = [0_u64; 257];
        for (weight, count) in weights.iter_mut().zip(counts) {
            *weight = u64::from(*count);
        }
        weights[RESERVED] = 1;
        let mut sizes = [0_usize; 257];
        // Figure K.1: each symbol is in one of the groups, and a step deeper whenever its group is joined with another.
        let mut groups = std::array::from_fn::<usize, 257, _>(|symbol| symbol);
        loop {
            // The least weight; the last of several, so that the reserved code becomes one of the longest.
            let lightest = |weights: &[u64; 257], but: usize| {
                let present = (0..257).rev().filter(|it| weights[*it] > 0 && *it != but);
                present.min_by_key(|it| weights[*it])
            };
            let Some(one) = lightest(&weights, usize::MAX) else { break };
            let Some(other) = lightest(&weights, one) else { break };
            weights[one] += std::mem::take(&mut weights[other]);
            for (group, size) in groups.iter_mut().zip(&mut sizes) {
                if *group == one || *group == other {
                    *group = one;
                    *size += 1;
                }
            }
        }

        // Figure K.3: pairs of codes that are too long are exchanged for a shorter one and a pair a level up.
        let mut numbers = [0_u16; 258];
        for size in sizes.into_iter().filter(|size| *size > 0) {
            numbers[size] += 1;
        }
        for long in (17..258).rev() {
            while numbers[long] > 0 {
                let Some(short) = (1..long - 1).rev().find(|it| numbers[*it] > 0) else { break };
                numbers[long] -= 2;
                numbers[long - 1] += 1;
                numbers[short + 1] += 2;
                numbers[short] -= 1;
            }
        }
        if let Some(last) = (1..17).rev().find(|length| numbers[*length] > 0) {
            numbers[last] -= 1;
        }

        // Figure K.4, and annex C for the codes.
        let mut symbols: Vec<u8> = (0..=255).filter(|it| sizes[usize::from(*it)] > 0).collect();
        symbols.sort_by_key(|symbol| sizes[usize::from(*symbol)]);
        let mut codes = Codes { symbols, ..Codes::default() };
        let (mut code, mut next) = (0_u16, 0);
        for (length, number) in (1..).zip(&numbers[1..17]) {
            codes.lengths[usize::from(length) - 1] = u8::try_from(*number).unwrap_or(u8::MAX);
            for symbol in codes.symbols.iter().skip(next).take(usize::from(*number)) {
                codes.of[usize::from(*symbol)] = (code, length);
                code = code.wrapping_add(1);
            }
            next += usize::from(*number);
            code = code.wrapping_shl(1);
        }
        codes
    }
}

/// Bytes that the reader looks ahead.
const AHEAD: usize = 8;

/// The entropy-coded bytes without the zero after each 0xFF (ITU-T T.81 B.1.1.5), and with some more at the end for the
/// reader.
fn unstuff(entropy_coded: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(entropy_coded.len() + AHEAD);
    let mut parts = entropy_coded.split(|byte| *byte == 0xFF);
    bytes.extend(parts.next()?);
    for part in parts {
        bytes.push(0xFF);
        bytes.extend(part.strip_prefix(&[0])?);
    }
    bytes.extend([0; AHEAD]);
    Some(bytes)
}

struct BitReader<'a> {
    bytes: &'a [u8],
    /// Index of the next bit.
    at: usize,
    /// The next bits, in the high end, from one symbol to the end of its value.
    word: u64,
}

impl BitReader<'_> {
    fn symbol(&mut self, table: &Table) -> Option<u8> {
        self.word = u64::from_be_bytes(*self.bytes.get(self.at / 8..)?.first_chunk()?);
        self.word <<= self.at % 8;
        let [first, second, ..] = self.word.to_be_bytes();
        let (length, symbol) = match table.short[usize::from(first)] {
            (0, _) => table.find(u16::from_be_bytes([first, second]).into())?,
            short => short,
        };
        self.skip(length);
        Some(symbol)
    }

    /// The bits after a symbol, and their number, which is in the symbol.
    fn value(&mut self, symbol: u8) -> (u32, u8) {
        let size = symbol & 15;
        let [.., a, b] = (self.word >> 1 >> (63 - size)).to_be_bytes();
        self.skip(size);
        (u16::from_be_bytes([a, b]).into(), size)
    }

    fn skip(&mut self, count: u8) {
        self.word <<= count;
        self.at += usize::from(count);
    }
}

struct BitWriter {
    bytes: Vec<u8>,
    /// Bits that aren't written yet, in the low end.
    pending: u64,
    count: u8,
}

impl BitWriter {
    /// Writes up to 16 bits.
    fn write(&mut self, bits: u32, count: u8) {
        self.pending = self.pending << count | u64::from(bits);
        self.count += count;
        if self.count >= 32 {
            self.count -= 32;
            let [.., a, b, c, d] = (self.pending >> self.count).to_be_bytes();
            self.extend([a, b, c, d]);
        }
    }

    /// Fills the last byte with ones, and ends the picture.
    fn finish(mut self) -> Vec<u8> {
        self.write(0x7F, 7);
        while self.count >= 8 {
            self.count -= 8;
            let [.., byte] = (self.pending >> self.count).to_be_bytes();
            self.extend([byte]);
        }
        self.bytes.extend([0xFF, 0xD9]);
        self.bytes
    }

    /// Stuffs a zero after each 0xFF.
    fn extend<const COUNT: usize>(&mut self, bytes: [u8; COUNT]) {
        if !bytes.contains(&0xFF) {
            self.bytes.extend(bytes);
            return;
        }
        for byte in bytes {
            self.bytes.push(byte);
            if byte == 0xFF {
                self.bytes.push(0);
            }
        }
    }
}
