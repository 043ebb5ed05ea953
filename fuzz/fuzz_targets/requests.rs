//! Any bytes as the body of any request: an answer or an error, never a panic. The first byte picks
//! the route; the model is a tiny fixture with a context of 64 tokens.

#![no_main]

// The server is part of a program, not of a library: its source is built into this target.
#[allow(dead_code)]
#[path = "../../cli/src/device.rs"]
mod device;
#[allow(dead_code, unused_imports)]
#[path = "../../cli/src/serve/mod.rs"]
mod serve;

use axum::body::Bytes;
use libfuzzer_sys::fuzz_target;
use mneme_engine::scheduler::Totals;
use serve::app::App;
use serve::routes::{Call, Handler, ROUTES, Route};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, LazyLock};

struct Setup {
    app: Arc<App>,
    routes: Vec<&'static Route>,
    runtime: tokio::runtime::Runtime,
}

static SETUP: LazyLock<Setup> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("model.gguf");
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/qwen2-tiny");
    let options = mneme_convert::ConvertOptions::new(fixture, &path);
    mneme_convert::convert(&options, &mut |_| ControlFlow::Continue(())).expect("the fixture");
    let flags = "-c 64 -np 2 -n 8 -t 1 --embeddings --metrics --props".split(' ');
    let flags: Vec<String> = flags.map(String::from).collect();
    let args = serve::args::Args::parse(&flags, |_| None).expect("flags");
    let (app, _) = serve::load(args, &path, Totals::default()).expect("the model loads");
    // The model is mapped; its name may go.
    drop(dir);
    Setup {
        app: Arc::new(app),
        routes: ROUTES.iter().filter(|r| r.method == "POST").collect(),
        runtime: tokio::runtime::Runtime::new().expect("threads"),
    }
});

fuzz_target!(|data: &[u8]| {
    let Some((first, body)) = data.split_first() else {
        return;
    };
    let setup = &*SETUP;
    let route = setup.routes[*first as usize % setup.routes.len()];
    let call = Call {
        id: "0".into(),
        query: vec![("action".into(), "erase".into())],
        headers: Default::default(),
        body: Bytes::copy_from_slice(body),
    };
    let Handler::Model(handler) = route.handler else {
        return;
    };
    setup.runtime.block_on(async {
        match handler(Arc::clone(&setup.app), call).await {
            Ok(response) => {
                // A stream is read to its end, so that pieces are looked at too.
                let body = axum::body::to_bytes(response.into_body(), 1 << 24).await;
                assert!(body.is_ok(), "{}: the reply broke off", route.paths[0]);
            }
            Err(e) => assert!(e.status.as_u16() >= 400, "{}", route.paths[0]),
        }
    });
});
