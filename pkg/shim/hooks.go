package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/internal/printable"
)

// hookTimeout bounds a hook that names no time of its own.
const hookTimeout = time.Minute

// runHooks runs hooks on the host, one after the other, with the container's
// state on their stdin, until one fails.
// https://github.com/opencontainers/runtime-spec/blob/v1.3.0/config.md#posix-platform-hooks
func (c *container) runHooks(ctx context.Context, kind string, hooks []specs.Hook, status specs.ContainerState) error {
	if len(hooks) == 0 {
		return nil
	}
	state := c.hookState
	state.Status = status
	input, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("%s hooks: %w", kind, err)
	}
	for _, h := range hooks {
		if err := c.sandbox.tree.OnHost(func() error { return runHook(ctx, h, input) }); err != nil {
			return fmt.Errorf("%s hook %s: %w", kind, h.Path, err)
		}
	}
	return nil
}

// runPoststop runs all of the hooks for the end of a container. It does so
// whatever becomes of the caller: they undo what the first hooks did.
func (c *container) runPoststop(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	for _, h := range c.hooks.Poststop {
		if err := c.runHooks(ctx, "poststop", []specs.Hook{h}, specs.StateStopped); err != nil {
			log.L.WithError(err).Warnf("container %s", c.id)
		}
	}
}

func runHook(ctx context.Context, h specs.Hook, input []byte) error {
	timeout := hookTimeout
	if h.Timeout != nil && *h.Timeout > 0 {
		timeout = time.Duration(*h.Timeout) * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args // with the program's name
	}
	cmd.Env = append([]string{}, h.Env...) // nothing of the shim's own
	cmd.Stdin = bytes.NewReader(input)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	// A child of the hook's may hold the output open.
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", err, ctx.Err())
		}
		if text := printable.String(output.String(), maxLine); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return err
	}
	return nil
}
