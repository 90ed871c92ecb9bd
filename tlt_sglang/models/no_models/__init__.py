"""An empty package of models: named in SGLANG_EXTERNAL_MODEL_PACKAGE, it makes SGLang skip
importing its two hundred model modules, so that `tlt_sglang.models.classes` can import just one."""
