//! The server before, while and after there is a model in memory: loading, awake, asleep.
//!
//! With `--sleep-idle-seconds` a server that nobody asks anything gives up its model, and loads it
//! again for the next request. What can be answered without the model is answered from notes taken
//! before it went, and wakes nobody.

use super::app::{App, now};
use super::args::Args;
use super::errors::{ApiError, ApiResult};
use super::metrics::Scrape;
use super::tools::Tools;
use super::{load, native, openai};
use mneme_engine::scheduler::{Command, SlotView, Totals};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the watch looks whether anybody works.
const TICK: Duration = Duration::from_millis(100);

/// What outlives the model.
pub struct Front {
    /// The flags.
    pub args: Args,
    /// Seconds since 1970 when the process started.
    pub started: u64,
    /// Totals at the last scrape of /metrics.
    pub scraped: Mutex<Scrape>,
    /// Tools that this server runs.
    pub tools: Tools,
    model: PathBuf,
    stage: Mutex<Stage>,
    /// Held while the model comes or goes, so that it does neither twice at a time.
    moving: tokio::sync::Mutex<()>,
}

enum Stage {
    /// The model was never there yet.
    Loading,
    Awake(Awake),
    Asleep(Arc<Notes>),
}

struct Awake {
    app: Arc<App>,
    /// The thread of the scheduler.
    engine: JoinHandle<()>,
    /// When a request that needs the model was last seen.
    used: Instant,
}

/// What a sleeping server still knows.
pub struct Notes {
    /// Reply of GET /props.
    pub props: Value,
    /// Reply of GET /v1/models.
    pub models: Value,
    /// Running totals.
    pub totals: Totals,
    /// The slots as they were.
    pub slots: Vec<SlotView>,
}

/// Who can answer now.
pub enum Present {
    /// The model is there.
    Awake(Arc<App>),
    /// It is not.
    Asleep(Arc<Notes>),
}

impl Front {
    /// A front without a model, which will be the one of the file `model`.
    pub fn new(args: Args, model: PathBuf) -> Front {
        Front {
            tools: Tools::new(&args),
            args,
            started: now(),
            scraped: Mutex::default(),
            model,
            stage: Mutex::new(Stage::Loading),
            moving: tokio::sync::Mutex::new(()),
        }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether the model was never there yet.
    pub fn is_loading(&self) -> bool {
        matches!(*self.stage(), Stage::Loading)
    }

    /// Who can answer without the model; wakes nobody, and does not count as use.
    pub fn present(&self) -> ApiResult<Present> {
        match &*self.stage() {
            Stage::Loading => Err(ApiError::unavailable("Loading model")),
            Stage::Awake(awake) => Ok(Present::Awake(Arc::clone(&awake.app))),
            Stage::Asleep(notes) => Ok(Present::Asleep(Arc::clone(notes))),
        }
    }

    /// The model for a request that needs it; loads it when it is not there.
    pub async fn app(self: &Arc<Front>) -> ApiResult<Arc<App>> {
        if let Some(app) = self.used()? {
            return Ok(app);
        }
        // On a task of its own: whoever asked may leave, others wait for the same model.
        let front = Arc::clone(self);
        let waking = tokio::spawn(async move {
            let _alone = front.moving.lock().await;
            match front.used()? {
                Some(app) => Ok(app),
                None => {
                    front.load().await.map_err(|e| {
                        tracing::warn!("waking: {e:#}");
                        ApiError::server(format!("loading the model again: {e:#}"))
                    })?;
                    front
                        .used()?
                        .ok_or_else(|| ApiError::unavailable("Loading model"))
                }
            }
        });
        (waking.await).unwrap_or_else(|e| Err(ApiError::server(format!("loading the model: {e}"))))
    }

    /// The model, if it is there, which counts as use.
    fn used(&self) -> ApiResult<Option<Arc<App>>> {
        match &mut *self.stage() {
            Stage::Loading => Err(ApiError::unavailable("Loading model")),
            Stage::Asleep(_) => Ok(None),
            Stage::Awake(awake) => {
                awake.used = Instant::now();
                Ok(Some(Arc::clone(&awake.app)))
            }
        }
    }

    /// Loads the model and becomes awake.
    pub async fn load(self: &Arc<Front>) -> anyhow::Result<()> {
        let totals = match &*self.stage() {
            Stage::Asleep(notes) => notes.totals.clone(),
            _ => Totals::default(),
        };
        let front = Arc::clone(self);
        let loading =
            tokio::task::spawn_blocking(move || load(front.args.clone(), &front.model, totals));
        let (app, engine) = loading.await??;
        let (n_slots, n_ctx) = (app.n_slots, app.n_ctx);
        let memory = app.memory.text.clone();
        *self.stage() = Stage::Awake(Awake {
            app: Arc::new(app),
            engine,
            used: Instant::now(),
        });
        // Only now: whoever reads it may ask at once.
        eprintln!("ready: {n_slots} slots of {n_ctx} tokens, memory {memory}");
        Ok(())
    }

    /// Lets the model go whenever nobody has used it for `after`. Never ends.
    pub async fn watch(self: Arc<Front>, after: Duration) {
        loop {
            tokio::time::sleep(TICK).await;
            let Ok(Present::Awake(app)) = self.present() else {
                continue;
            };
            let Ok(totals) = app.ask(Command::Totals).await else {
                continue;
            };
            if totals.processing + totals.deferred > 0 {
                // A failure is impossible here; it would be one on the next round.
                let _ = self.used();
                continue;
            }
            let since = match &*self.stage() {
                Stage::Awake(awake) if awake.used.elapsed() >= after => awake.used,
                _ => continue,
            };
            let Ok(slots) = app.ask(Command::Slots).await else {
                continue;
            };
            let Ok(props) = native::properties(&app).await else {
                continue;
            };
            let models = openai::model_list(&app);
            drop(app);
            let notes = Notes {
                props,
                models,
                totals,
                slots,
            };
            self.sleep(since, notes).await;
        }
    }

    /// Lets the model go, unless it was used after `since` or is in use.
    async fn sleep(&self, since: Instant, notes: Notes) {
        let _alone = self.moving.lock().await;
        let awake = {
            let mut stage = self.stage();
            match &*stage {
                // Nobody else holds the model, and nobody can get it while the stage is locked.
                Stage::Awake(awake)
                    if awake.used == since && Arc::strong_count(&awake.app) == 1 => {}
                _ => return,
            }
            match std::mem::replace(&mut *stage, Stage::Asleep(Arc::new(notes))) {
                Stage::Awake(awake) => awake,
                _ => return,
            }
        };
        awake.end().await;
        eprintln!("asleep: the model is not in memory");
    }

    /// Ends what runs and lets the model go, for good.
    pub async fn end(&self) {
        let _alone = self.moving.lock().await;
        let stage = std::mem::replace(&mut *self.stage(), Stage::Loading);
        if let Stage::Awake(awake) = stage {
            // What still runs after the grace is told that the server ends.
            let _ = tokio::time::timeout(Duration::from_secs(2), awake.end()).await;
        }
    }
}

impl Awake {
    /// Stops the scheduler and waits until its thread has ended.
    async fn end(self) {
        let _ = self.app.handle.send(Command::Stop);
        drop(self.app);
        let _ = tokio::task::spawn_blocking(move || self.engine.join()).await;
    }
}
