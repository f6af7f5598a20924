//! `perigee init-model`: a random model as a checkpoint directory with a byte-level tokenizer and the default chat template,
//! or the demo model with its own.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::Context;
use perigee_model::{ModelSpec, WeightSource};
use perigee_text::template::DEFAULT_TEMPLATE;
use perigee_text::{SpecialIds, byte_level_config, byte_level_tokenizer};

/// Arguments of `init-model`.
#[derive(clap::Args)]
pub(crate) struct InitModelArgs {
    /// What to write: `random:PRESET[@SEED]` or `demo`.
    #[arg(long, default_value = "random:tiny")]
    model: String,
    /// Directory to make; it must not exist or be empty.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Print one JSON object when done.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &InitModelArgs) -> anyhow::Result<()> {
    let spec: ModelSpec = args.model.parse()?;
    let text_files = text_files(&spec)?;
    let shown = std::io::stderr().is_terminal();
    let mut written = 0;
    perigee_model::init_model(&args.directory, &spec, &mut |done, all| {
        written = done;
        if shown {
            eprint!("\r{} of {} MB", done / 1_000_000, all / 1_000_000);
        }
    })?;
    if shown {
        eprintln!();
    }
    for (name, contents) in text_files {
        let path = args.directory.join(name);
        std::fs::write(&path, contents.as_bytes()).with_context(|| path.display().to_string())?;
    }
    if args.json {
        println!("{}", serde_json::json!({"directory": args.directory, "bytes": written}));
    } else {
        println!("wrote {} ({} bytes of weights) to {}", args.model, written, args.directory.display());
    }
    Ok(())
}

/// Names and contents of the files about text.
fn text_files(spec: &ModelSpec) -> anyhow::Result<Vec<(&'static str, Cow<'static, str>)>> {
    const TOKENIZER: &str = "tokenizer.json";
    const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
    const TEMPLATE: &str = "chat_template.jinja";
    if *spec == ModelSpec::Demo {
        return Ok(vec![
            (TOKENIZER, perigee_demo::TOKENIZER.into()),
            (TOKENIZER_CONFIG, perigee_demo::TOKENIZER_CONFIG.into()),
            ("generation_config.json", perigee_demo::GENERATION_CONFIG.into()),
            (TEMPLATE, perigee_demo::CHAT_TEMPLATE.into()),
        ]);
    }
    let source = WeightSource::open(spec)?;
    let config = source.config();
    let special = SpecialIds { bos: config.bos, eos: config.eos.first().copied(), pad: config.pad };
    let tokenizer = byte_level_tokenizer(config.vocab as u32, special)?;
    let names = byte_level_config(config.vocab as u32, special)?;
    Ok(vec![
        (TOKENIZER, serde_json::to_string_pretty(&tokenizer)?.into()),
        (TOKENIZER_CONFIG, serde_json::to_string_pretty(&names)?.into()),
        (TEMPLATE, DEFAULT_TEMPLATE.into()),
    ])
}
