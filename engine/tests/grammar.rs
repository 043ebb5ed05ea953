//! Grammars: what they let through, what they refuse, and that hostile ones end.

mod fixture;

use std::sync::LazyLock;

use mneme_engine::grammar::{Error, Grammar, GrammarVocab};
use mneme_engine::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};

static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_gguf(&fixture::gguf("llama-tiny")).unwrap());

static VOCAB: LazyLock<GrammarVocab> = LazyLock::new(|| GrammarVocab::new(&TOKENIZER).unwrap());

/// Whether the grammar takes `text`, token by token under its own mask, and may end there.
fn takes(grammar: &Grammar, text: &str) -> bool {
    let mut g = grammar.clone();
    for id in TOKENIZER.encode(text, false, false) {
        let mut logits = vec![0.0; TOKENIZER.n_vocab()];
        g.mask(&mut logits).unwrap();
        if logits[id as usize] == f32::NEG_INFINITY {
            assert_eq!(g.validate(&[id]).unwrap(), 0, "mask and parser agree");
            return false;
        }
        g.accept(id).unwrap();
    }
    let complete = g.is_complete();
    let mut logits = vec![0.0; TOKENIZER.n_vocab()];
    g.mask(&mut logits).unwrap();
    let eos = TOKENIZER.eos().unwrap();
    assert_eq!(
        logits[eos as usize] == 0.0,
        complete,
        "the end is allowed where the text is complete"
    );
    if complete {
        g.accept(eos).unwrap();
    }
    complete
}

/// Asserts which texts a grammar takes.
fn check(grammar: &Grammar, yes: &[&str], no: &[&str]) {
    for text in yes {
        assert!(takes(grammar, text), "should take {text:?}");
    }
    for text in no {
        assert!(!takes(grammar, text), "should refuse {text:?}");
    }
}

#[test]
fn json_schema() {
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
        "required": ["name", "age"], "additionalProperties": false
    });
    let g = VOCAB.json_schema(&schema).unwrap();
    check(
        &g,
        &[
            "{\"name\": \"Bö\", \"age\": 3}",
            "{\"name\":\"\",\"age\":0,\"tags\":[\"a\",\"b\"]}",
        ],
        &[
            "{\"name\": \"x\"}",
            "{\"name\": 3",
            "{\"name\": \"x\", \"age\": -1}",
            "{\"name\": \"x\", \"age\": 3, \"z\"",
            "[",
            "",
        ],
    );
    let any = VOCAB.json_schema(&json!({})).unwrap();
    check(
        &any,
        &["{}", "{\"a\": [1, {\"b\": null}]}"],
        &["[]", "3", "{\"a\"}"],
    );
    for bad in [
        json!({"type": "nope"}),
        json!({"type": 3}),
        json!({"$ref": "#/nowhere"}),
        json!({"pattern": "(", "type": "string"}),
    ] {
        let e = VOCAB
            .json_schema(&bad)
            .err()
            .unwrap_or_else(|| panic!("{bad} compiled"));
        assert!(e.to_string().starts_with("json schema: "), "{e}");
    }
}

#[test]
fn regex_and_lark() {
    let g = VOCAB.regex("[a-c]+(-[0-9]{2})?").unwrap();
    check(&g, &["abc", "a-12"], &["", "d", "a-1", "a-123"]);
    assert!(VOCAB.regex("(").is_err());
    let g = VOCAB
        .lark("start: \"yes\" | \"no\" \" \" word\nword: /[a-z]+/")
        .unwrap();
    check(&g, &["yes", "no maybe"], &["no", "yes x"]);
    assert!(VOCAB.lark("start: undefined_rule").is_err());
}

#[test]
fn gbnf() {
    let g = |source: &str| {
        VOCAB
            .gbnf(source)
            .unwrap_or_else(|e| panic!("{source}: {e}"))
    };
    check(
        &g("root ::= \"yes\" | \"no\""),
        &["yes", "no"],
        &["y", "yesno", ""],
    );
    // A longer literal must not swallow the shorter: characters, not lexemes.
    check(
        &g("root ::= \"a\" \"bc\" | \"ab\" \"d\""),
        &["abc", "abd"],
        &["ab", "abcd"],
    );
    check(
        &g("root ::= [a-z]* \"z\""),
        &["z", "azbz", "zzz"],
        &["a", "za"],
    );
    check(
        &g("root ::= [^\"\\n]{2,3}"),
        &["ab", "a-ü"],
        &["a", "abcd", "a\n", "a\""],
    );
    check(
        &g("root ::= (\"a\" | \"b\")+ \"c\"? # comment\n"),
        &["ab", "abac"],
        &["c", "acc"],
    );
    check(
        &g("root ::= item{2}\nitem ::= \"x\" | \"y\""),
        &["xy"],
        &["x", "xyx"],
    );
    check(&g("root ::= \"x\"{2,}"), &["xx", "xxxxx"], &["x"]);
    check(
        &g("root ::= \"\\x41\\u00e9\\n\\t\\\"\\\\\""),
        &["Aé\n\t\"\\"],
        &["A"],
    );
    check(&g("root ::= [\\]\\-a]+ ."), &["]-aß"], &["]"]);
    check(&g("root ::= \"a\" ( | \"b\")"), &["a", "ab"], &["b"]);
    check(
        &g("root ::=\n  \"a\"\n  | \"b\"\n  | rest-of_it\n\nrest-of_it ::=\n  \"c\" root"),
        &["a", "ccb"],
        &["c"],
    );
    check(&g("root ::= [a-b-]+"), &["a-b"], &["c"]);
    let json = r##"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"##;
    check(
        &g(json),
        &[
            "{}",
            "{\"a\": [1, -2.5e3, \"x\\n\\u00fc\", true], \"b\":{}}",
            "{ \"ä\": null}\n  ",
        ],
        &[
            "[1]",
            "{\"a\" 1}",
            "{\"a\": 01}",
            "{'a': 1}",
            "{\"a\": tru}",
        ],
    );
}

#[test]
fn broken_gbnf_names_line_and_construct() {
    for (source, line, part) in [
        ("", 1, "root"),
        ("root", 1, "::="),
        ("a ::= \"x\"", 1, "root"),
        ("root ::= b", 1, "\"b\""),
        ("root ::= \"a\nb\"", 1, "never closed"),
        ("root ::= [a", 1, "never closed"),
        ("root ::= []", 1, "at least one"),
        ("root ::= [z-a]", 1, "backwards"),
        ("root ::= (\"a\"", 1, "never closed"),
        ("root ::= \"a\")", 1, ""),
        ("root ::= \"a\"{3,2}", 1, "backwards"),
        ("root ::= \"a\"{}", 1, "number"),
        ("root ::= \"a\"{99999}", 1, "99999"),
        ("root ::= \"\\q\"", 1, "escape"),
        ("root ::= \"\\ud800\"", 1, "hexadecimal"),
        ("root ::= \"a\"\nroot ::= \"b\"", 2, "twice"),
        ("root ::= \"a\"\n\nb ::= ?", 3, "?"),
        ("root ::= !<x>", 1, "not supported"),
        ("root ::= <x", 1, "never closed"),
    ] {
        match VOCAB.gbnf(source) {
            Err(Error::Gbnf { line: at, what }) => {
                assert_eq!(at, line, "{source:?}: {what}");
                assert!(what.contains(part), "{source:?}: {what}");
            }
            Err(e) => panic!("{source:?}: {e}"),
            Ok(_) => panic!("{source:?} compiled"),
        }
    }
}

#[test]
fn clones_go_their_own_way_and_rollback_takes_back() {
    let g = VOCAB.regex("a[bc]d").unwrap();
    let ids = |text: &str| TOKENIZER.encode(text, false, false);
    let mut first = g.clone();
    first.accept(ids("a")[0]).unwrap();
    let mut second = first.clone();
    first.accept(ids("b")[0]).unwrap();
    second.accept(ids("c")[0]).unwrap();
    for g in [&mut first, &mut second] {
        assert!(!g.is_complete());
        g.accept(ids("d")[0]).unwrap();
        assert!(g.is_complete());
    }
    first.rollback(2).unwrap();
    assert!(!first.is_complete());
    first.accept(ids("c")[0]).unwrap();
    let e = first.accept(ids("z")[0]).unwrap_err();
    assert!(matches!(e, Error::State(_)), "{e}");
}

#[test]
fn mask_covers_rows_beyond_the_vocabulary() {
    let mut g = VOCAB.regex("[a-z]+").unwrap();
    let mut logits = vec![1.0; TOKENIZER.n_vocab() + 70];
    g.mask(&mut logits).unwrap();
    assert!(
        logits[TOKENIZER.n_vocab()..]
            .iter()
            .all(|l| *l == f32::NEG_INFINITY)
    );
    let a = TOKENIZER.encode("a", false, false)[0];
    assert_eq!(logits[a as usize], 1.0);
    let mut short = vec![1.0; 100];
    g.mask(&mut short).unwrap();
    assert!(short.contains(&1.0) && short.contains(&f32::NEG_INFINITY));
}

/// Compiles and, if that works, takes a few steps.
fn attempt(grammar: Result<Grammar, Error>) {
    if let Ok(mut g) = grammar {
        for _ in 0..3 {
            let mut logits = vec![0.0; TOKENIZER.n_vocab()];
            if g.mask(&mut logits).is_err() {
                return;
            }
            let Some(id) = logits.iter().position(|l| *l == 0.0) else {
                return;
            };
            if g.accept(id as u32).is_err() {
                return;
            }
        }
    }
}

#[test]
fn hostile_grammars_end() {
    let deep = format!(
        "root ::= {}\"a\"{}",
        "(".repeat(100_000),
        ")".repeat(100_000)
    );
    assert!(matches!(VOCAB.gbnf(&deep), Err(Error::Gbnf { .. })));
    assert!(matches!(
        VOCAB.regex(&"(".repeat(100_000)),
        Err(Error::TooDeep { .. })
    ));
    assert!(matches!(
        VOCAB.lark(&format!("start: {}", "(".repeat(100_000))),
        Err(Error::TooDeep { .. })
    ));
    assert!(matches!(
        VOCAB.gbnf(&" ".repeat(2 << 20)),
        Err(Error::TooLong { .. })
    ));
    let mut schema = json!({"type": "string"});
    for _ in 0..300 {
        schema = json!({"type": "array", "items": schema});
    }
    assert!(matches!(
        VOCAB.json_schema(&schema),
        Err(Error::TooDeep { .. })
    ));
    attempt(VOCAB.gbnf("root ::= ((((\"a\"{2000}){2000}){2000}){2000}){2000}"));
    attempt(VOCAB.gbnf("root ::= root"));
    attempt(VOCAB.gbnf("root ::= root root | \"\""));
    attempt(VOCAB.gbnf("root ::= a\na ::= b\nb ::= a | \"x\" a"));
    attempt(VOCAB.gbnf("root ::= (\"a\"*)*"));
    attempt(VOCAB.regex("((a{1000}){1000}){1000}"));
    attempt(VOCAB.regex("(.*a){20}.{500}"));
    attempt(VOCAB.json_schema(&json!({"type": "array", "minItems": 1_000_000_000, "items": {"type": "string", "minLength": 1_000_000}})));
    attempt(VOCAB.json_schema(&json!({"$ref": "#"})));
    attempt(VOCAB.json_schema(&json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]})));
    attempt(VOCAB.json_schema(&json!({"allOf": [{"$ref": "#"}]})));
    let wide: Value = (0..2000)
        .map(|i| (format!("k{i}"), json!({"type": "string"})))
        .collect::<serde_json::Map<_, _>>()
        .into();
    attempt(VOCAB.json_schema(&json!({"type": "object", "properties": wide})));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_gbnf_text_is_an_error_or_a_grammar(source in "(root ::= )?[-a-z\"\\[\\](){}|*+?.<>!:= \\n\\\\#0-9^,é]{0,60}") {
        attempt(VOCAB.gbnf(&source));
    }

    #[test]
    fn literals_take_exactly_themselves(text in "[a-z0-9 ,.:é😀]{1,12}") {
        let literal: String = text.chars().map(|c| format!("\\U{:08X}", c as u32)).collect();
        let g = VOCAB.gbnf(&format!("root ::= \"{literal}\"")).unwrap();
        prop_assert!(takes(&g, &text));
        let more = format!("{text}x");
        prop_assert!(!takes(&g, &more));
    }
}
