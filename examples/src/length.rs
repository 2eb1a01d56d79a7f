//! Lengths as people write them: `4096`, `64K`, `1M`, `1e9`.

/// Parses a whole number of positions: digits (`_` between them allowed), a power of ten as in `1e9` or `2.5e6`, or a binary
/// multiple as in `64K` = 65,536, `1M` = 1,048,576, `1G` = 2^30.
///
/// # Errors
/// A sentence that says what is allowed.
///
/// ```
/// use ring_examples::length::parse_length;
/// assert_eq!(parse_length("64K"), Ok(65_536));
/// assert_eq!(parse_length("1e9"), Ok(1_000_000_000));
/// assert!(parse_length("-3").is_err());
/// ```
pub fn parse_length(text: &str) -> Result<usize, String> {
    let digits = text.trim().replace('_', "");
    let (number, unit) = match digits.chars().last() {
        Some('K' | 'k') => (&digits[..digits.len() - 1], 1_u128 << 10),
        Some('M') => (&digits[..digits.len() - 1], 1 << 20),
        Some('G') => (&digits[..digits.len() - 1], 1 << 30),
        _ => (digits.as_str(), 1),
    };
    let whole = decimal(number).and_then(|number| number.checked_mul(unit));
    whole
        .and_then(|number| usize::try_from(number).ok())
        .ok_or_else(|| "not a whole number such as 4096, 64K, 1M or 1e9".to_string())
}

/// `digits[.digits][e digits]` as a whole number, exactly.
fn decimal(text: &str) -> Option<u128> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<u32>().ok()?),
        None => (text, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let fraction = fraction.trim_end_matches('0');
    let only_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !only_digits(whole) || !only_digits(fraction) {
        return None;
    }
    let zeros = exponent.checked_sub(u32::try_from(fraction.len()).ok()?)?;
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    digits.checked_mul(10_u128.checked_pow(zeros)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_notation_is_exact() {
        for (text, length) in [
            ("0", 0),
            ("4096", 4096),
            ("1_000", 1000),
            ("64K", 65_536),
            ("64k", 65_536),
            ("1M", 1 << 20),
            ("2G", 2 << 30),
            ("1e9", 1_000_000_000),
            ("2.5e6", 2_500_000),
            ("4.0", 4),
        ] {
            assert_eq!(parse_length(text), Ok(length), "{text}");
        }
    }

    #[test]
    fn what_is_no_whole_number_is_refused() {
        for text in [
            "", "K", "-1", "1.5", "1e-3", "1e99", "0x10", "1e", "e9", "nan", "1 2", "1KK", "+",
        ] {
            assert!(parse_length(text).is_err(), "{text}");
        }
    }
}
