//! The few things of CUDA's language that no header can give to a C++ compiler: shared memory, and inline PTX.
//!
//! An `asm` statement becomes a call of a function in `ptx.h`, named for its instruction, with the operands in their order. An
//! instruction that has no function there does not compile.

use std::collections::HashMap;

use crate::error::EmulatorError;

/// The translation of a kernel's source, with what the runtime needs to call the kernel.
pub(crate) fn translate(cuda: &str, entry: &str) -> Result<String, EmulatorError> {
    let source = replace_asm(&replace_shared(cuda)?)?;
    Ok(format!("{source}\nCUDA_EMULATOR_ENTRY({entry})\n"))
}

/// The same source with its values numbered in the order in which they appear. CubeCL's compiler numbers some of them in another
/// order in every process.
pub(crate) fn renumber(cuda: &str) -> String {
    let mut numbers = HashMap::new();
    let mut out = String::with_capacity(cuda.len());
    let mut rest = cuda;
    while let Some(at) = rest.find('v') {
        let digits = rest[at + 1..]
            .bytes()
            .take_while(u8::is_ascii_digit)
            .count();
        let end = at + 1 + digits;
        let begins = !rest[..at].ends_with(|c: char| c.is_ascii_alphanumeric());
        let ends = !rest[end..].starts_with(|c: char| c.is_ascii_alphanumeric());
        // What stands before in `out` ends where `rest` begins.
        let begins = begins && (at > 0 || !out.ends_with(|c: char| c.is_ascii_alphanumeric()));
        out.push_str(&rest[..at]);
        if digits > 0 && begins && ends {
            let next = numbers.len();
            let number = numbers.entry(&rest[at + 1..end]).or_insert(next);
            out.push_str(&format!("v{number}"));
        } else {
            out.push_str(&rest[at..end]);
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Declarations of shared memory become pointers to the block's.
fn replace_shared(cuda: &str) -> Result<String, EmulatorError> {
    const EXTERN: &str = "extern __shared__ __align__(";
    let mut out = String::with_capacity(cuda.len());
    let mut rest = cuda;
    while let Some(at) = rest.find(EXTERN) {
        out.push_str(&rest[..at]);
        let declaration = &rest[at + EXTERN.len()..];
        let parsed = declaration.split_once(") char ").and_then(|(align, tail)| {
            let (name, tail) = tail.split_once("[];")?;
            Some((align, name, tail))
        });
        let Some((align, name, tail)) = parsed else {
            return Err(error(&out, "a declaration of shared memory".to_string()));
        };
        out.push_str(&format!(
            "char* const {name} = ::cuda_emulator::shared_memory({align});"
        ));
        rest = tail;
    }
    out.push_str(rest);
    match out.find("__shared__") {
        Some(at) => Err(error(&out[..at], "static shared memory".to_string())),
        None => Ok(out),
    }
}

fn replace_asm(cuda: &str) -> Result<String, EmulatorError> {
    let mut out = String::with_capacity(cuda.len());
    let mut rest = cuda;
    while let Some(at) = find_asm(rest) {
        out.push_str(&rest[..at]);
        let (call, tail) = statement(&rest[at..]).map_err(|what| error(&out, what))?;
        out.push_str(&call);
        rest = tail;
    }
    out.push_str(rest);
    Ok(out)
}

/// Where the word `asm` begins a statement.
fn find_asm(text: &str) -> Option<usize> {
    text.match_indices("asm").map(|(at, _)| at).find(|&at| {
        let before = text[..at].chars().next_back();
        let after = text[at + 3..].trim_start();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
            && (after.starts_with('(') || after.starts_with("volatile"))
    })
}

fn error(before: &str, what: String) -> EmulatorError {
    EmulatorError::Translate {
        line: before.lines().count().max(1),
        what,
    }
}

/// The calls in place of the statement that begins here, and what follows it.
fn statement(text: &str) -> Result<(String, &str), String> {
    let open = text.find('(').ok_or("an asm statement without (")?;
    let (parts, tail) = parts(&text[open + 1..])?;
    let tail = tail
        .trim_start()
        .strip_prefix(';')
        .ok_or("an asm statement without ; at its end")?;
    let template = literals(parts.first().ok_or("an asm statement without a text")?)?;
    let mut operands = Vec::new();
    for list in parts.iter().skip(1).take(2) {
        operands.extend(expressions(list)?);
    }
    Ok((calls(&template, &operands)?, tail))
}

/// The parts between colons of what stands in the parentheses, and what follows them.
fn parts(text: &str) -> Result<(Vec<&str>, &str), String> {
    let mut parts = Vec::new();
    let mut begin = 0;
    let mut depth = 0;
    let mut quoted = false;
    let mut escaped = false;
    let bytes = text.as_bytes();
    for (at, &byte) in bytes.iter().enumerate() {
        if quoted {
            (quoted, escaped) = (escaped || byte != b'"', !escaped && byte == b'\\');
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'(' | b'[' | b'{' => depth += 1,
            b')' if depth == 0 => {
                parts.push(&text[begin..at]);
                return Ok((parts, &text[at + 1..]));
            }
            b')' | b']' | b'}' => depth -= 1,
            b':' if depth == 0
                && bytes.get(at + 1) != Some(&b':')
                && bytes[at.saturating_sub(1)] != b':' =>
            {
                parts.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    Err("an asm statement that does not end".to_string())
}

/// The text of the string literals, one after the other.
fn literals(text: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut characters = text.chars();
    let mut quoted = false;
    while let Some(c) = characters.next() {
        match (quoted, c) {
            (_, '"') => quoted = !quoted,
            (true, '\\') => match characters.next() {
                Some('n' | 't' | 'r') => out.push(' '),
                Some(c @ ('"' | '\\' | '\'')) => out.push(c),
                other => return Err(format!("the escape \\{other:?} in an asm statement")),
            },
            (true, c) => out.push(c),
            (false, c) if c.is_whitespace() => {}
            (false, c) => return Err(format!("`{c}` outside of the text of an asm statement")),
        }
    }
    Ok(out)
}

/// The expressions of a list of operands.
fn expressions(list: &str) -> Result<Vec<&str>, String> {
    let mut found = Vec::new();
    let mut rest = list.trim();
    while !rest.is_empty() {
        let open = rest.find('(').ok_or("an operand without (")?;
        let (inner, tail) = parts(&rest[open + 1..])?;
        if inner.len() != 1 {
            return Err("an operand with :".to_string());
        }
        found.push(inner[0].trim());
        rest = tail.trim_start().trim_start_matches(',').trim_start();
    }
    Ok(found)
}

/// Calls for the instructions of a template.
fn calls(template: &str, operands: &[&str]) -> Result<String, String> {
    if template.trim_start().starts_with('{') {
        return block(template, operands);
    }
    let instructions = template.split(';').map(str::trim);
    instructions
        .filter(|instruction| !instruction.is_empty())
        .map(|instruction| call(instruction, operands))
        .collect()
}

/// A block with registers of its own. CubeCL writes one: it elects a lane.
fn block(template: &str, operands: &[&str]) -> Result<String, String> {
    if template.contains("elect.sync") && operands.len() == 1 {
        return Ok(format!(
            "::cuda_emulator::ptx::elect_sync({});",
            operands[0]
        ));
    }
    Ok(unknown(template))
}

fn call(instruction: &str, operands: &[&str]) -> Result<String, String> {
    let (opcode, arguments) = instruction
        .split_once(char::is_whitespace)
        .unwrap_or((instruction, ""));
    let name: String = opcode
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    let mut expressions = Vec::new();
    for argument in arguments.split(|c: char| ",[]{}".contains(c) || c.is_whitespace()) {
        match argument.strip_prefix('%').map(str::parse::<usize>) {
            Some(Ok(index)) => expressions.push(
                *operands
                    .get(index)
                    .ok_or_else(|| format!("operand {index} of `{instruction}`"))?,
            ),
            None if argument.is_empty() => {}
            None if argument.chars().all(|c| c.is_ascii_digit()) => expressions.push(argument),
            _ => return Ok(unknown(instruction)),
        }
    }
    Ok(format!(
        "::cuda_emulator::ptx::{name}({});",
        expressions.join(", ")
    ))
}

fn unknown(instruction: &str) -> String {
    let text: String = instruction.replace(['"', '\\'], "'");
    format!("static_assert(false, \"the emulator does not know the PTX instruction {text}\");")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_numbered_as_they_appear() {
        assert_eq!(
            renumber("int v12 = *v7; info_v3 v12_store; vec v7x nv7 device volatile v7"),
            "int v0 = *v1; info_v2 v0_store; vec v7x nv7 device volatile v1"
        );
    }

    #[test]
    fn instructions_become_calls_with_their_operands() {
        let source = "x = [&]{ asm volatile(\"ld.x4 {%0, %1}, [%2], 16;\" : \"=r\"(r.i_0), \"=r\"(r.i_1) : \"r\"(at(a, b)) \
                      : \"memory\"); return r; }();";
        assert_eq!(
            replace_asm(source).unwrap(),
            "x = [&]{ ::cuda_emulator::ptx::ld_x4(r.i_0, r.i_1, at(a, b), 16); return r; }();"
        );
        let source = "asm (\"cp.async.cg.shared::cta.global [%0], [%1], 16, %2;\" :  : \"r\"(a), \"l\"(b), \"r\"(n) );";
        assert_eq!(
            replace_asm(source).unwrap(),
            "::cuda_emulator::ptx::cp_async_cg_shared__cta_global(a, b, 16, n);"
        );
    }

    #[test]
    fn what_is_not_understood_does_not_compile() {
        for text in ["{ .reg .pred p; }", "mov.u32 %0, %laneid;"] {
            let source = format!("asm(\"{text}\" : \"=r\"(x));");
            let translated = replace_asm(&source).unwrap();
            assert!(
                translated.starts_with("static_assert(false"),
                "{translated}"
            );
        }
        for source in ["asm(\"nop;\"", "asm(\"add %3;\" : \"=r\"(x));"] {
            assert!(replace_asm(source).is_err(), "{source}");
        }
    }

    #[test]
    fn shared_memory_becomes_a_pointer() {
        assert_eq!(
            replace_shared("extern __shared__ __align__(16) char v1[];").unwrap(),
            "char* const v1 = ::cuda_emulator::shared_memory(16);"
        );
        let error = replace_shared("\n__shared__ float x[4];").unwrap_err();
        assert!(error.to_string().contains("static shared memory"));
    }
}
