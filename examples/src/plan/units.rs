//! Numbers as people read them.

/// `1234567` as `1,234,567`.
pub(super) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes: `512 B`, `1.50 KiB`, `422 MiB`.
pub(super) fn bytes(bytes: u64) -> String {
    let units = [" B", " KiB", " MiB", " GiB", " TiB", " PiB"];
    scaled(bytes as f64, 1024.0, &units)
}

/// A number of pairs: `512`, `1.50 k`, `128 G`.
pub(super) fn count(count: u128) -> String {
    scaled(
        count as f64,
        1000.0,
        &["", " k", " M", " G", " T", " P", " E", " Z"],
    )
}

/// Three digits and a unit; whole numbers below the first unit.
fn scaled(number: f64, base: f64, units: &[&str]) -> String {
    let mut number = number;
    let mut unit = 0;
    // 999.5 would be rounded to 1000.
    while number >= base.min(999.5) && unit + 1 < units.len() {
        number /= base;
        unit += 1;
    }
    let decimals = match number {
        _ if unit == 0 => 0,
        n if n < 9.995 => 2,
        n if n < 99.95 => 1,
        _ => 0,
    };
    format!("{number:.decimals$}{}", units[unit])
}

/// A position or a length, short: `2,048`, `64K`, `3M`, `1e9`.
pub(super) fn tokens(number: usize) -> String {
    for (unit, name) in [(1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")] {
        if number.is_multiple_of(unit) && (1..1024).contains(&(number / unit)) {
            return format!("{}{name}", number / unit);
        }
    }
    let mut zeros = 0;
    let mut digits = number;
    while digits > 0 && digits.is_multiple_of(10) {
        digits /= 10;
        zeros += 1;
    }
    if zeros >= 6 {
        return format!("{digits}e{zeros}");
    }
    thousands(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_true() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_000_000_000), "1,000,000,000");
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "0.98 KiB");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(442_564_608), "422 MiB");
        assert_eq!(count(128_000_150_784), "128 G");
        assert_eq!(tokens(65_536), "64K");
        assert_eq!(tokens(1_000_000_000), "1e9");
        assert_eq!(tokens(1_200_000_000), "12e8");
        assert_eq!(tokens(0), "0");
        assert_eq!(tokens(2_500), "2,500");
        assert_eq!(tokens(1_234_567), "1,234,567");
    }
}
